"""numba kernels: fused hash + scan + write, and the replay that reduces a segment.

They address slots of one KV head inside vLLM's pages (`hashevict_vllm.cache.page`).
Inner loops run over slices, as a signed scalar index costs numba a wrap-around test per
element. Items, a request's or piece's KV head each, are shared by OpenMP's threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hashevict_vllm.kernels.cpu.jit import kernel
from hashevict_vllm.kernels.cpu.layer import pages_of, rule_of
from hashevict_vllm.kernels.cpu.openmp import share_items
from hashevict_vllm.kernels.cpu.replay import replay_items
from hashevict_vllm.kernels.cpu.tokens import tokens_at
from hashevict_vllm.kernels.cpu.views import unowned
from hashevict_vllm.kernels.cpu.write import Writes, write_items

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
    recent,
    requests,
    block_table,
    projection,
    k_map,
    v_map,
    geometry,
    rule,
    strengths,
    openmp,
):
    """Hash, choose the slot, write K, V, signature and position of single tokens.

    Design 1.2. Tokens of one request must not depend on each other's slots: at most one
    evicting token per request and call.

    Args:
        elements: Raw K/V elements of the layer, unsigned [..], see `LayerPages`.
        tail: int32 view of the same bytes.
        places: Of q, k and v, see `hashevict_vllm.kernels.cpu.tokens.addresses`.
        rows: int32 [n], rows of q, k, v.
        positions: int32 [n], absolute positions.
        slots: int32 [n], slot to append to; the number of live slots if evicting.
        evict: bool [n], whether to overwrite the victim instead of appending.
        recent: int32 [n], the most recent tokens that are protected.
        requests: int32 [n], rows of the block table.
        block_table: int32 [R, max blocks].
        projection: float32 [D * b], R row-major; empty where the rule hashes nothing.
        k_map: int32 [N, D], element of K[slot, d] within a (block, head).
        v_map: int32 [N, D], the same for V.
        geometry: int64 [9]: H, N, D, W, element stride and word stride of a block,
            first tail word of a page, element kind, b.
        rule: int64 [5]: sinks, kind of score (`codes`), seed, pool, vote_every.
        strengths: float32 [5]: factor of the hashed part of a logit, decay, softmax
            scale, credit, votes for values (`hashevict_vllm.kernels.cpu.layer.Rule`).
        openmp: int64 [2], as `hashevict_vllm.kernels.cpu.openmp.find_openmp`.

    Raises:
        RuntimeError: If a part of the tokens was not written.

    """
    heads, runs, work = geometry[0], 0, 0
    for n in range(len(rows)):
        runs += n == 0 or requests[n] != requests[n - 1]
        work += heads * (SCAN_WORK if evict[n] else 1)
    done = share_items(
        write_items,
        (
            pages_of(elements, tail, k_map, v_map, geometry),
            rule_of(rule, projection, geometry[8], strengths),
            tokens_at(places, elements),
            Writes(
                unowned(rows),
                unowned(positions),
                unowned(slots),
                unowned(evict),
                unowned(recent),
                unowned(requests),
                unowned(block_table),
            ),
        ),
        runs * heads,
        openmp[0],
        _threads(openmp, runs * heads, work),
    )
    if not done:
        raise RuntimeError("an eviction kernel failed; not all tokens were written")


@njit
def _threads(openmp, items, work):
    """How many threads are worth starting for so many items, and as much work."""
    if openmp[0] == 0:
        return 1
    return max(1, min(openmp[1], items, work // WORK_OF_A_THREAD))


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
    openmp,
):
    """Replay the decode rule for tokens beyond the budget; compact complete segments.

    Design 1.3. Victims are marked ``~position`` and stay in place, as later tokens of
    the open segment still attend to them. A complete segment is compacted: survivors
    beyond the budget move into the marked slots, in order of their slots.

    Args:
        elements: As `write_tokens`, here only moved.
        tail: As `write_tokens`; holds the piece's signatures and positions already.
        places: As `write_tokens`.
        pieces: int32 [n, 10], rows as `hashevict_vllm.kernels.cpu.replay.Piece`.
        block_table: int32 [R, max blocks].
        projection: As `write_tokens`.
        k_map: int32 [N, D].
        v_map: int32 [N, D].
        geometry: As `write_tokens`.
        rule: As `write_tokens`.
        strengths: As `write_tokens`.
        openmp: As `write_tokens`.

    Raises:
        RuntimeError: If a part of the segments was not reduced.

    """
    items = len(pieces) * geometry[0]
    done = share_items(
        replay_items,
        (
            pages_of(elements, tail, k_map, v_map, geometry),
            rule_of(rule, projection, geometry[8], strengths),
            tokens_at(places, elements),
            unowned(pieces),
            unowned(block_table),
        ),
        items,
        openmp[0],
        _threads(openmp, items, items * WORK_OF_A_THREAD),
    )
    if not done:
        raise RuntimeError("an eviction kernel failed; not all segments were reduced")


def warm_up(dtype: np.dtype) -> None:
    """Compile (or load from the disk cache) the kernels for one element type.

    Args:
        dtype: Unsigned integer type of the raw K/V elements.

    """
    elements, tail = np.zeros(1, dtype), np.zeros(1, np.int32)
    places = (0, 0, 0, 0, 0, 0, 0, 1)
    none, table = np.zeros(0, np.int32), np.zeros((1, 1), np.int32)
    geometry, rule = np.ones(9, np.int64), np.zeros(5, np.int64)
    floats = np.zeros(3, np.float32)
    openmp = np.array([0, 1], np.int64)
    common = (table, floats, table, table, geometry, rule, floats, openmp)
    no_flags, no_pieces = np.zeros(0, bool), np.zeros((0, 10), np.int32)
    tokens = (none, none, none, no_flags, none, none)
    write_tokens(elements, tail, places, *tokens, *common)
    replay_segments(elements, tail, places, no_pieces, *common)
