"""How tokens are written: hash, choose the slot, write K, V and what a slot keeps.

The work of a step is cut into items, one per (request, KV head), so that threads can
share it; what a thread does is in `write_items`.

An evicting token costs memory accesses far apart: 128 lines of a page for a transposed
key, and a run of every block for the scan. So requests follow each other in a pipeline.
While the queries of one are hashed, its first blocks come from memory, and so do the
lines that the request before will overwrite. The scan goes block by block, all heads of
it, as their metadata are neighbours in memory.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hashevict_vllm.kernels.codes import (
    HAMMING_TO_KEY,
    HAMMING_TO_QUERY,
    KEY_DIFF,
    RANDOM,
    RECENCY,
    VOTE,
)
from hashevict_vllm.kernels.cpu_frame import (
    AT_ONCE,
    adjacent_keys,
    describe_in,
    describe_slots,
    frame_of,
    last_group,
)
from hashevict_vllm.kernels.cpu_hamming import merge, merged_shape
from hashevict_vllm.kernels.cpu_scan import BEST_SIZE, best_slot, reset_best
from hashevict_vllm.kernels.cpu_scores import (
    describe_key,
    find_victim,
    merge_queries,
    scan_block,
)
from hashevict_vllm.kernels.cpu_slots import (
    copy_in,
    prefetch_rows,
    prefetch_slot,
    row_size,
    tail_of,
)
from hashevict_vllm.kernels.cpu_tokens import load_new_key
from hashevict_vllm.kernels.cpu_votes import cast_votes

BLOCKS_AHEAD = 4
"""Blocks whose metadata are asked for before a scan; then one by one, as it goes on."""


@njit
def write_items(
    elements,
    tail,
    tokens,
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
    first,
    last,
):
    """Write items [first, last), numbered request by request, head by head.

    Arguments as `hashevict_vllm.kernels.cpu.write_tokens`.
    """
    heads, block_size, dim, words = geometry[0], geometry[1], geometry[2], geometry[3]
    group = tokens.group if rule[2] == HAMMING_TO_QUERY else 1
    x, y = np.empty(group * dim, np.float32), np.empty(dim, np.float32)
    dots = np.empty(group * geometry[8], np.float32)
    queries = np.empty((group, words), np.int32)
    descriptions = np.zeros((heads, 1, words), np.int32)
    shape = merged_shape(group, words)
    merged = np.zeros((heads, shape[0], shape[1]), np.int32)
    best = np.empty((heads, BEST_SIZE), np.int32)
    victims = np.zeros(heads, np.int64)
    scratch = np.empty(block_size, np.int32)
    frames = np.zeros((heads, 3 * dim), np.float64)
    lanes = adjacent_keys(k_map, rule[0] if rule[2] == VOTE else 0)
    # The request whose victims are chosen, but not overwritten yet, and its heads.
    before, waiting, waiting_to = np.int64(0), np.int64(0), np.int64(0)
    stop, item = np.int64(0), np.int64(0)
    while stop < len(rows):
        start = stop
        while stop < len(rows) and requests[stop] == requests[start]:
            stop += 1
        low, high = max(first - item, 0), min(last - item, heads)
        item += heads
        row, blocks = rows[start], block_table[requests[start]]
        for head in range(low, high):
            if not evict[start]:
                append_tokens(
                    elements,
                    tail,
                    tokens,
                    rows[start:stop],
                    positions[start:stop],
                    slots[start:stop],
                    blocks,
                    head,
                    projection,
                    k_map,
                    v_map,
                    geometry,
                    rule,
                    lanes,
                    x[:dim],
                    y,
                    dots[: geometry[8]],
                    descriptions[0, 0],
                    frames[0],
                )
                continue
            look_ahead(
                elements,
                tail,
                blocks,
                slots[start],
                head,
                voters[start],
                k_map,
                geometry,
                rule,
            )
            victim_blocks = block_table[requests[before]]
            if waiting < waiting_to:
                victim = victims[waiting]
                prefetch_slot(elements, victim_blocks, victim, waiting, k_map, geometry)
                prefetch_slot(elements, victim_blocks, victim, waiting, v_map, geometry)
            describe_new(
                elements,
                tail,
                tokens,
                row,
                positions[start],
                np.int64(slots[start]),
                blocks,
                head,
                projection,
                k_map,
                geometry,
                rule,
                lanes,
                x,
                y,
                dots,
                frames[head],
                queries,
                descriptions[head],
                merged[head],
            )
            if waiting < waiting_to:
                copy_in(
                    elements,
                    tokens,
                    rows[before],
                    victim_blocks,
                    victims[waiting],
                    waiting,
                    k_map,
                    v_map,
                    geometry,
                )
                waiting += 1
        if low >= high or not evict[start]:
            continue
        # Two requests may differ in how many of their heads are this thread's.
        overwrite(
            elements,
            tokens,
            rows[before],
            block_table[requests[before]],
            victims,
            waiting,
            waiting_to,
            k_map,
            v_map,
            geometry,
        )
        choose_victims(
            elements,
            tail,
            tokens,
            row,
            positions[start],
            blocks,
            slots[start],
            low,
            high,
            voters[start],
            projection,
            k_map,
            geometry,
            rule,
            strengths,
            frames,
            merged,
            best,
            scratch,
            descriptions,
            victims,
        )
        before, waiting, waiting_to = start, low, high
    if waiting < waiting_to:
        overwrite(
            elements,
            tokens,
            rows[before],
            block_table[requests[before]],
            victims,
            waiting,
            waiting_to,
            k_map,
            v_map,
            geometry,
        )


@njit
def rows_read(geometry, rule, votes):
    """The rows [first, end) of a tail that a scan reads, a ballot before if ``votes``.

    Positions are left out where only the few blocks with a new best slot need them.
    """
    words = geometry[3]
    if rule[2] == RECENCY or rule[2] == RANDOM:
        return words, words + 1
    if rule[2] == VOTE:
        return (np.int64(0), words + 1) if votes else (words - 1, words)
    return np.int64(0), words


@njit
def look_ahead(elements, tail, blocks, num_slots, head, votes, k_map, geometry, rule):
    """Ask for what one head's description and the beginning of its scan read."""
    end = min(BLOCKS_AHEAD * geometry[1], np.int64(num_slots))
    row, last_row = rows_read(geometry, rule, votes)
    prefetch_rows(tail, blocks, 0, end, head, geometry, row, last_row)
    if rule[2] == VOTE:
        # The sinks, of which slot 0 is one, make the frame.
        prefetch_slot(elements, blocks, 0, head, k_map, geometry)


@njit
def describe_new(
    elements,
    tail,
    tokens,
    row,
    t,
    num_slots,
    blocks,
    head,
    projection,
    k_map,
    geometry,
    rule,
    lanes,
    x,
    y,
    dots,
    frame,
    queries,
    description,
    merged,
):
    """Describe an evicting token's key, and what slots are to be compared with.

    Written: ``description`` int32 [1, W], ``merged`` as `merge`, with votes ``frame``
    [3 D]. Scratch: ``x`` [G * D], ``y`` [D], ``dots`` [G * b], ``queries`` [G, W].
    """
    key_dots = dots[: geometry[8]]
    load_new_key(tokens, row, head, geometry, y)
    if rule[2] == VOTE:
        sinks = rule[0]
        frame_of(elements, blocks, head, k_map, lanes, geometry, sinks, x, frame)
        if t == num_slots:  # the first that evicts
            describe_slots(
                elements,
                tail,
                blocks,
                last_group(num_slots),
                num_slots,
                head,
                projection,
                k_map,
                geometry,
                x,
                key_dots,
                description[0],
                frame,
            )
        describe_in(y, frame, projection, key_dots, description[0])
    else:
        describe_key(y, projection, key_dots, rule, description[0])
    if rule[2] == HAMMING_TO_QUERY:
        merge_queries(tokens, row, head, projection, x, dots, queries, geometry, merged)
    elif rule[2] == HAMMING_TO_KEY:
        merge(description, merged)


@njit
def choose_victims(
    elements,
    tail,
    tokens,
    row,
    t,
    blocks,
    num_slots,
    low,
    high,
    votes,
    projection,
    k_map,
    geometry,
    rule,
    strengths,
    frames,
    merged,
    best,
    scratch,
    descriptions,
    victims,
):
    """Choose victims in heads [low, high) and describe the token at position t there.

    Arrays by head: ``frames`` [H, 3 D], ``merged``, ``descriptions`` [H, 1, W],
    ``victims`` [H], written, ``best`` [H, BEST_SIZE], scratch as ``scratch`` int32 [N].
    """
    block_size = geometry[1]
    group, num_slots = np.int64(merged.shape[1] - 2), np.int64(num_slots)
    if votes:
        for head in range(low, high):
            cast_votes(
                tail,
                tokens,
                row,
                blocks,
                num_slots,
                head,
                projection,
                geometry,
                rule,
                strengths,
                frames[head],
                t,
            )
    scratch[:] = np.int32(0)
    for head in range(low, high):
        reset_best(best[head])
    row, last_row = rows_read(geometry, rule, votes)
    for first in range(0, num_slots if rule[2] != KEY_DIFF else 0, block_size):
        ahead = first + BLOCKS_AHEAD * block_size
        for head in range(low, high):
            if ahead < num_slots:
                prefetch_rows(
                    tail, blocks, ahead, ahead + 1, head, geometry, row, last_row
                )
            scan_block(
                tail,
                blocks,
                first,
                num_slots,
                head,
                merged,
                group,
                t,
                geometry,
                rule,
                scratch,
                best,
                head,
            )
    for head in range(low, high):
        slot = best_slot(best[head])
        if rule[2] == KEY_DIFF:
            slot = find_victim(
                elements,
                tail,
                blocks,
                num_slots,
                head,
                merged[head : head + 1],
                group,
                t,
                k_map,
                geometry,
                rule,
                scratch,
                best[head : head + 1],
            )
        victims[head] = slot
        describe_slot(tail, blocks, slot, head, geometry, descriptions[head, 0], t)


@njit
def overwrite(
    elements, tokens, row, blocks, victims, low, high, k_map, v_map, geometry
):
    """Write K and V of a token over its victims in heads [low, high)."""
    for head in range(low, high):
        for ahead in range(low if head == low else head + 1, min(head + 2, high)):
            prefetch_slot(elements, blocks, victims[ahead], ahead, k_map, geometry)
            prefetch_slot(elements, blocks, victims[ahead], ahead, v_map, geometry)
        slot = victims[head]
        copy_in(elements, tokens, row, blocks, slot, head, k_map, v_map, geometry)


@njit
def describe_slot(tail, blocks, slot, head, geometry, description, position):
    """Write what a slot keeps of its key, int32 [W], and its position."""
    words, size = geometry[3], row_size(geometry)
    at = tail_of(blocks, slot, head, geometry) + slot % geometry[1]
    for w in range(words):
        tail[at + w * size] = description[w]
    tail[at + words * size] = position


@njit
def append_tokens(
    elements,
    tail,
    tokens,
    rows,
    positions,
    slots,
    blocks,
    head,
    projection,
    k_map,
    v_map,
    geometry,
    rule,
    lanes,
    x,
    y,
    dots,
    description,
    frame,
):
    """Append tokens of one request to one KV head.

    ``rows``, ``positions`` and ``slots`` int32 [n]; scratch: ``x`` and ``y``
    [D], ``dots`` [b], ``description`` [W], ``frame`` [3 D]. A single token is described
    for votes with its neighbours, see `AT_ONCE`.
    """
    votes = rule[2] == VOTE
    late = votes and len(rows) == 1 and (slots[0] + 1) % AT_ONCE != 0
    if votes and not late and positions[0] >= rule[0]:
        frame_of(elements, blocks, head, k_map, lanes, geometry, rule[0], x, frame)
        describe_slots(
            elements,
            tail,
            blocks,
            last_group(np.int64(slots[0])),
            np.int64(slots[0]),
            head,
            projection,
            k_map,
            geometry,
            x,
            dots,
            description,
            frame,
        )
    for i in range(len(rows)):
        slot, position = np.int64(slots[i]), positions[i]
        load_new_key(tokens, rows[i], head, geometry, y)
        if votes and late:
            description[:] = 0
        elif votes and position >= rule[0]:
            describe_in(y, frame, projection, dots, description)
        else:
            describe_key(y, projection, dots, rule, description)
        describe_slot(tail, blocks, slot, head, geometry, description, position)
        copy_in(elements, tokens, rows[i], blocks, slot, head, k_map, v_map, geometry)
        if votes and position == rule[0] - 1:
            frame_of(elements, blocks, head, k_map, lanes, geometry, rule[0], x, frame)
            describe_slots(
                elements,
                tail,
                blocks,
                0,
                rule[0],
                head,
                projection,
                k_map,
                geometry,
                x,
                dots,
                description,
                frame,
            )
            description[:] = 0
