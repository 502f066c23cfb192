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
    RECENCY,
    VOTE,
)
from hashevict_vllm.kernels.cpu_frame import (
    adjacent_keys,
    describe_in,
    describe_sinks,
    frame_of,
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
    tail_of,
)
from hashevict_vllm.kernels.cpu_tokens import load_new_key
from hashevict_vllm.kernels.cpu_votes import cast_votes

BLOCKS_AHEAD = 8
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
    key_dots = dots[: geometry[8]]
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
    before, waiting_from, waiting_to = np.int64(-1), np.int64(0), np.int64(0)
    stop, item = np.int64(0), np.int64(0)
    while stop < len(rows):
        start = stop
        while stop < len(rows) and requests[stop] == requests[start]:
            stop += 1
        low, high = max(first - item, 0), min(last - item, heads)
        item += heads
        if low >= high:
            continue
        blocks, num_slots = block_table[requests[start]], np.int64(slots[start])
        if not evict[start]:
            for head in range(low, high):
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
                    key_dots,
                    descriptions[0, 0],
                    frames[0],
                )
            continue
        row, t = rows[start], positions[start]
        # What the scan reads: votes and positions, with a ballot's words, or all.
        first_row = words - 1 if rule[2] == VOTE and not voters[start] else 0
        first_row = words if rule[2] == RECENCY else first_row
        ahead = min(BLOCKS_AHEAD * block_size, num_slots)
        for head in range(low, high):
            prefetch_rows(tail, blocks, 0, ahead, head, geometry, first_row)
            if rule[2] == VOTE:
                prefetch_slot(elements, blocks, 0, head, k_map, geometry)
            if waiting_from < waiting_to:
                prefetch_victim(
                    elements,
                    block_table[requests[before]],
                    victims[waiting_from],
                    waiting_from,
                    k_map,
                    v_map,
                    geometry,
                )
            load_new_key(tokens, row, head, geometry, y)
            description = descriptions[head]
            if rule[2] == VOTE:
                frame = frames[head]
                frame_of(
                    elements, blocks, head, k_map, lanes, geometry, rule[0], x, frame
                )
                describe_in(y, frame, projection, key_dots, description[0])
            else:
                describe_key(y, projection, key_dots, rule, description[0])
            if rule[2] == HAMMING_TO_QUERY:
                merge_queries(
                    tokens,
                    row,
                    head,
                    projection,
                    x,
                    dots,
                    queries,
                    geometry,
                    merged[head],
                )
            elif rule[2] == HAMMING_TO_KEY:
                merge(description, merged[head])
            if waiting_from < waiting_to:
                copy_in(
                    elements,
                    tokens,
                    rows[before],
                    block_table[requests[before]],
                    victims[waiting_from],
                    waiting_from,
                    k_map,
                    v_map,
                    geometry,
                )
                waiting_from += 1
        while waiting_from < waiting_to:
            copy_in(
                elements,
                tokens,
                rows[before],
                block_table[requests[before]],
                victims[waiting_from],
                waiting_from,
                k_map,
                v_map,
                geometry,
            )
            waiting_from += 1
        if voters[start]:
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
        for first_slot in range(0, num_slots if rule[2] != KEY_DIFF else 0, block_size):
            for head in range(low, high):
                if first_slot + ahead < num_slots:
                    prefetch_rows(
                        tail,
                        blocks,
                        first_slot + ahead,
                        first_slot + ahead + block_size,
                        head,
                        geometry,
                        first_row,
                    )
                scan_block(
                    tail,
                    blocks,
                    first_slot,
                    num_slots,
                    head,
                    merged[head],
                    group,
                    t,
                    geometry,
                    rule,
                    scratch,
                    best[head],
                )
        for head in range(low, high):
            if rule[2] == KEY_DIFF:
                slot = find_victim(
                    elements,
                    tail,
                    blocks,
                    num_slots,
                    head,
                    merged[head],
                    group,
                    t,
                    k_map,
                    geometry,
                    rule,
                    scratch,
                    best[head],
                )
            else:
                slot = best_slot(best[head])
            victims[head] = slot
            describe_slot(tail, blocks, slot, head, geometry, descriptions[head, 0], t)
        before, waiting_from, waiting_to = start, low, high
    for head in range(waiting_from, waiting_to):
        blocks = block_table[requests[before]]
        if head == waiting_from:
            prefetch_victim(
                elements, blocks, victims[head], head, k_map, v_map, geometry
            )
        if head + 1 < waiting_to:
            prefetch_victim(
                elements, blocks, victims[head + 1], head + 1, k_map, v_map, geometry
            )
        copy_in(
            elements,
            tokens,
            rows[before],
            blocks,
            victims[head],
            head,
            k_map,
            v_map,
            geometry,
        )


@njit
def prefetch_victim(elements, blocks, slot, head, k_map, v_map, geometry):
    """Ask for all lines of a slot that is overwritten soon."""
    prefetch_slot(elements, blocks, slot, head, k_map, geometry)
    prefetch_slot(elements, blocks, slot, head, v_map, geometry)


@njit
def describe_slot(tail, blocks, slot, head, geometry, description, position):
    """Write what a slot keeps of its key, int32 [W], and its position."""
    block_size, words = geometry[1], geometry[3]
    at = tail_of(blocks, slot, head, geometry) + slot % block_size
    for w in range(words):
        tail[at + w * block_size] = description[w]
    tail[at + words * block_size] = position


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
    [D], ``dots`` [b], ``description`` [W], ``frame`` [3 D].
    """
    framed = False
    for i in range(len(rows)):
        slot, position = np.int64(slots[i]), positions[i]
        load_new_key(tokens, rows[i], head, geometry, y)
        if rule[2] == VOTE and position >= rule[0]:
            if not framed:
                frame_of(
                    elements, blocks, head, k_map, lanes, geometry, rule[0], x, frame
                )
                framed = True
            describe_in(y, frame, projection, dots, description)
        else:
            describe_key(y, projection, dots, rule, description)
        describe_slot(tail, blocks, slot, head, geometry, description, position)
        copy_in(elements, tokens, rows[i], blocks, slot, head, k_map, v_map, geometry)
        if rule[2] == VOTE and position == rule[0] - 1:
            frame_of(elements, blocks, head, k_map, lanes, geometry, rule[0], x, frame)
            describe_sinks(
                elements,
                tail,
                blocks,
                head,
                projection,
                k_map,
                geometry,
                rule[0],
                y,
                dots,
                description,
                frame,
            )
            framed = True
