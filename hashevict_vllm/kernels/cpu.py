"""numba kernels: fused hash + scan + write, and the replay that reduces a segment.

They address slots of one KV head inside vLLM's pages (`hashevict_vllm.cache.page`).
Inner loops run over slices, as a signed scalar index costs numba a wrap-around test per
element. Items, a request's or piece's KV head each, are shared by OpenMP's threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hashevict_vllm.kernels.codes import HAMMING_TO_KEY, HAMMING_TO_QUERY, VOTE
from hashevict_vllm.kernels.cpu_frame import (
    adjacent_keys,
    describe_slots,
    frame_of,
    last_group,
)
from hashevict_vllm.kernels.cpu_hamming import merge, merged_shape
from hashevict_vllm.kernels.cpu_scan import BEST_SIZE
from hashevict_vllm.kernels.cpu_scores import find_victim, merge_queries
from hashevict_vllm.kernels.cpu_slots import borrowed, elements_of, row_size, tail_of
from hashevict_vllm.kernels.cpu_tokens import tokens_at
from hashevict_vllm.kernels.cpu_votes import cast_votes, mark_losers
from hashevict_vllm.kernels.cpu_write import write_items
from hashevict_vllm.kernels.jit import inlined, kernel
from hashevict_vllm.kernels.team import share_items

SCAN_WORK = 4
"""What an evicting token costs, in units of one that is appended; about 0.5 us."""
WORK_OF_A_THREAD = 32
"""Units that are worth waking a thread for."""


@kernel
def write_tokens(
    elements,
    tail,
    places,
    rows,
    positions,
    slots,
    evict,
    voters,
    requests,
    block_table,
    projection,
    k_map,
    v_map,
    geometry,
    rule,
    strengths,
    team,
):
    """Hash, choose the slot, write K, V, signature and position of single tokens.

    Design 1.2. Tokens of one request must not depend on each other's slots: at most one
    evicting token per request and call.

    Args:
        elements: Raw K/V elements of the layer, unsigned [..], see `LayerPages`.
        tail: int32 view of the same bytes.
        places: Of q, k and v, see `hashevict_vllm.kernels.cpu_tokens.addresses`.
        rows: int32 [n], rows of q, k, v.
        positions: int32 [n], absolute positions.
        slots: int32 [n], slot to append to; the number of live slots if evicting.
        evict: bool [n], whether to overwrite the victim instead of appending.
        voters: bool [n], whether an evicting token's queries vote first.
        requests: int32 [n], rows of the block table.
        block_table: int32 [R, max blocks].
        projection: float32 [D * b], R row-major; empty where the rule hashes nothing.
        k_map: int32 [N, D], element of K[slot, d] within a (block, head).
        v_map: int32 [N, D], the same for V.
        geometry: int64 [9]: H, N, D, W, element stride and word stride of a block,
            first tail word of a page, element kind, b.
        rule: int64 [6]: sinks, recent, kind of score (`codes`), seed, pool, vote_every.
        strengths: float32, as `cast_votes`.
        team: int64 [2], as `hashevict_vllm.kernels.team.find_team`.

    """
    heads, runs, work = geometry[0], 0, 0
    for n in range(len(rows)):
        runs += n == 0 or requests[n] != requests[n - 1]
        work += heads * (SCAN_WORK if evict[n] else 1)
    share_items(
        write_items,
        (
            borrowed(elements),
            borrowed(tail),
            tokens_at(places, elements),
            borrowed(rows),
            borrowed(positions),
            borrowed(slots),
            borrowed(evict),
            borrowed(voters),
            borrowed(requests),
            borrowed(block_table),
            borrowed(projection),
            borrowed(k_map),
            borrowed(v_map),
            borrowed(geometry),
            borrowed(rule),
            borrowed(strengths),
        ),
        runs * heads,
        team[0],
        _threads(team, runs * heads, work),
    )


@njit
def _threads(team, items, work):
    """How many threads are worth starting for so many items, and as much work."""
    if team[0] == 0:
        return 1
    return max(1, min(team[1], items, work // WORK_OF_A_THREAD))


@inlined
def _replay_head(
    elements,
    tail,
    tokens,
    piece,
    blocks,
    head,
    projection,
    k_map,
    geometry,
    rule,
    budget,
):
    """Mark, for one (piece, KV head), the victims of the tokens beyond the budget."""
    block_size, words, size = geometry[1], geometry[3], row_size(geometry)
    group = tokens.group if rule[2] == HAMMING_TO_QUERY else 1
    first_slot, count = np.int64(piece[4]), np.int64(piece[2])
    scratch = np.empty(block_size, np.int32)
    best = np.empty((1, BEST_SIZE), np.int32)
    x = np.empty(group * geometry[2], np.float32)
    dots = np.empty(group * geometry[8], np.float32)
    sources = np.empty((group, words), np.int32)
    shape = merged_shape(group, words)
    merged = np.zeros((1, shape[0], shape[1]), np.int32)
    for i in range(max(budget - first_slot, 0), count):
        slot = first_slot + i
        if rule[2] == HAMMING_TO_QUERY:
            row = piece[3] + i
            merge_queries(
                tokens, row, head, projection, x, dots, sources, geometry, merged[0]
            )
        elif rule[2] == HAMMING_TO_KEY:
            at = tail_of(blocks, slot, head, geometry) + slot % block_size
            for w in range(words):
                sources[0, w] = tail[at + w * size]
            merge(sources, merged[0])
        victim = find_victim(
            elements,
            tail,
            blocks,
            slot,
            head,
            merged,
            group,
            piece[1] + i,
            k_map,
            geometry,
            rule,
            scratch,
            best,
        )
        at = tail_of(blocks, victim, head, geometry)
        at += words * size + victim % block_size
        tail[at] = ~tail[at]


@inlined
def _compact_head(elements, tail, end, blocks, head, k_map, v_map, geometry, budget):
    """Move survivors in slots [budget, end) into the marked slots, in slot order."""
    block_size, dim, words = geometry[1], geometry[2], geometry[3]
    row, size = row_size(geometry), 2 * block_size * dim
    hole = np.int64(-1)
    for slot in range(budget, end):
        at = tail_of(blocks, slot, head, geometry)
        offset = slot % block_size
        source_meta = at + offset
        if tail[source_meta + words * row] < 0:
            continue
        position = np.int32(0)
        while position >= 0:
            hole += 1
            at = tail_of(blocks, hole, head, geometry)
            target_offset = hole % block_size
            target_meta = at + target_offset
            position = tail[target_meta + words * row]
        for w in range(words + 1):
            tail[target_meta + w * row] = tail[source_meta + w * row]
        at = elements_of(blocks, slot, head, geometry)
        source = elements[at : at + size]
        at = elements_of(blocks, hole, head, geometry)
        target = elements[at : at + size]
        for d in range(dim):
            target[k_map[target_offset, d]] = source[k_map[offset, d]]
            target[v_map[target_offset, d]] = source[v_map[offset, d]]


@njit
def _replay_items(
    elements,
    tail,
    tokens,
    pieces,
    block_table,
    projection,
    k_map,
    v_map,
    geometry,
    rule,
    strengths,
    budget,
    first,
    last,
):
    """Reduce items [first, last): piece by piece, head by head."""
    heads = geometry[0]
    x, frame = np.empty(geometry[2], np.float32), np.zeros(3 * geometry[2], np.float64)
    dots, words = np.empty(geometry[8], np.float32), np.zeros(geometry[3], np.int32)
    lanes = adjacent_keys(k_map, rule[0] if rule[2] == VOTE else 0)
    for item in range(first, last):
        piece, head = pieces[item // heads], item % heads
        blocks = block_table[piece[0]]
        end = np.int64(piece[4]) + np.int64(piece[2])
        if rule[2] == VOTE:
            if piece[6] < piece[2] or piece[5]:
                frame_of(
                    elements, blocks, head, k_map, lanes, geometry, rule[0], x, frame
                )
                if piece[2] == 1:
                    describe_slots(
                        elements,
                        tail,
                        blocks,
                        last_group(end),
                        end,
                        head,
                        projection,
                        k_map,
                        geometry,
                        x,
                        dots,
                        words,
                        frame,
                    )
            for i in range(piece[6], piece[2], max(piece[7], 1)):
                cast_votes(
                    tail,
                    tokens,
                    piece[3] + i,
                    blocks,
                    np.int64(piece[4]) + i,
                    head,
                    projection,
                    geometry,
                    rule,
                    strengths,
                    frame,
                    piece[1] + i if piece[7] else -1,
                )
            if piece[5]:
                stop = piece[1] + piece[2]
                mark_losers(tail, blocks, end, head, stop, geometry, rule, budget)
        else:
            _replay_head(
                elements,
                tail,
                tokens,
                piece,
                blocks,
                head,
                projection,
                k_map,
                geometry,
                rule,
                budget,
            )
        if piece[5]:
            _compact_head(
                elements, tail, end, blocks, head, k_map, v_map, geometry, budget
            )


@kernel
def replay_segments(
    elements,
    tail,
    places,
    pieces,
    block_table,
    projection,
    k_map,
    v_map,
    geometry,
    rule,
    strengths,
    team,
    budget,
):
    """Replay the decode rule for tokens beyond the budget; compact complete segments.

    Design 1.3. Victims are marked ``~position`` and stay in place, as later tokens of
    the open segment still attend to them. A complete segment is compacted: survivors
    beyond the budget move into the marked slots, in order of their slots.

    Args:
        elements: As `write_tokens`, here only moved.
        tail: As `write_tokens`; holds the piece's signatures and positions already.
        places: As `write_tokens`.
        pieces: int32 [n, 8]: request, start position, count, row, slot, compact, first
            voting token (``count`` if none votes), distance of voting tokens (0 in a
            segment, where all that follow the first vote).
        block_table: int32 [R, max blocks].
        projection: As `write_tokens`.
        k_map: int32 [N, D].
        v_map: int32 [N, D].
        geometry: As `write_tokens`.
        rule: As `write_tokens`.
        strengths: As `write_tokens`.
        team: As `write_tokens`.
        budget: C.

    """
    items = len(pieces) * geometry[0]
    share_items(
        _replay_items,
        (
            borrowed(elements),
            borrowed(tail),
            tokens_at(places, elements),
            borrowed(pieces),
            borrowed(block_table),
            borrowed(projection),
            borrowed(k_map),
            borrowed(v_map),
            borrowed(geometry),
            borrowed(rule),
            borrowed(strengths),
            budget,
        ),
        items,
        team[0],
        _threads(team, items, items * WORK_OF_A_THREAD),
    )


def warm_up(dtype: np.dtype) -> None:
    """Compile (or load from the disk cache) the kernels for one element type.

    Args:
        dtype: Unsigned integer type of the raw K/V elements.

    """
    elements, tail = np.zeros(1, dtype), np.zeros(1, np.int32)
    places = (0, 0, 0, 0, 0, 0, 0, 1)
    none, table = np.zeros(0, np.int32), np.zeros((1, 1), np.int32)
    geometry, rule = np.ones(9, np.int64), np.zeros(6, np.int64)
    floats = np.zeros(3, np.float32)
    team = np.array([0, 1], np.int64)
    common = (table, floats, table, table, geometry, rule, floats, team)
    no_flags, no_pieces = np.zeros(0, bool), np.zeros((0, 8), np.int32)
    write_tokens(
        elements, tail, places, none, none, none, no_flags, no_flags, none, *common
    )
    replay_segments(elements, tail, places, no_pieces, *common, 1)
