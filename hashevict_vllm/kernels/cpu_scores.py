"""Signatures, scores and the choice of the victim (numba); rules in `policies`.

A score is an int32 of at least 0; the largest is evicted, ties go to the oldest.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hashevict_vllm.kernels.codes import (
    HAMMING_TO_QUERY,
    KEY_DIFF,
    NORM,
    RANDOM,
    VOTE,
)
from hashevict_vllm.kernels.cpu_hamming import merge
from hashevict_vllm.kernels.cpu_hash import hash_row, pack_signs, project_rows
from hashevict_vllm.kernels.cpu_scan import (
    TOP,
    best_slot,
    hamming_scores,
    keep_best,
    largest_score,
    reset_best,
)
from hashevict_vllm.kernels.cpu_slots import load_key, row_size, tail_of
from hashevict_vllm.kernels.cpu_tokens import load_queries
from hashevict_vllm.kernels.jit import inlined

COSINE_UNIT = np.float32(2.0**29)
"""Integer steps of a cosine's score: (cos + 1) times this."""


@njit(fastmath={"contract", "reassoc"})
def square_of(x):
    """‖x‖² of float32 [D]."""
    square = np.float32(0)
    for d in range(len(x)):
        square += x[d] * x[d]
    return square


@njit
def describe_key(x, projection, dots, rule, words):
    """What a slot keeps of its key x [D] for later scores, into ``words`` [W].

    Votes describe keys in a frame: `hashevict_vllm.kernels.cpu_frame`.
    """
    if rule[2] <= HAMMING_TO_QUERY:
        hash_row(x, projection, dots, words)
    elif rule[2] == NORM:
        words.view(np.float32)[0] = square_of(x)  # its bits order as the float does


@njit
def merge_queries(tokens, row, head, projection, x, dots, sources, geometry, merged):
    """Sign the G query heads of a KV head and merge their signatures.

    Scratch: ``x`` [G * D], ``dots`` [G * b], ``sources`` [G, W].
    """
    group, b = sources.shape[0], geometry[8]
    load_queries(tokens, row, head, geometry, x)
    project_rows(x, projection, dots, group)
    for g in range(group):
        pack_signs(dots[g * b : (g + 1) * b], sources[g])
    merge(sources, merged)


@inlined
def _mix(seed, t, position):
    """Pseudo-random int32 >= 0 of three integers (`policies.random`)."""
    # numba multiplies uint32 into uint64, so every product is cut back.
    h = np.uint32(np.uint32(position) * np.uint32(0x9E3779B1))
    h = np.uint32(h ^ np.uint32(np.uint32(t) * np.uint32(0x85EBCA77)))
    h = np.uint32(h ^ np.uint32(np.uint32(seed) * np.uint32(0xC2B2AE3D)))
    h = np.uint32((h ^ (h >> np.uint32(15))) * np.uint32(0x2C1B3C6D))
    h = np.uint32((h ^ (h >> np.uint32(12))) * np.uint32(0x297A2D39))
    return np.int32((h ^ (h >> np.uint32(15))) & np.uint32(0x7FFFFFFF))


@inlined
def _inverse_norm(x):
    """1 / ‖x‖ of float32 [D]."""
    return np.float32(1) / np.sqrt(square_of(x))


@njit
def _mean_direction(elements, tail, blocks, num_slots, head, k_map, geometry, mean):
    """Normalised mean of the normalised keys of live slots, into ``mean`` [D]."""
    x = np.empty(len(mean), np.float32)
    mean[:] = np.float32(0)
    for slot in range(num_slots):
        at = tail_of(blocks, slot, head, geometry) + geometry[3] * row_size(geometry)
        if tail[at + slot % geometry[1]] < 0:
            continue
        load_key(elements, blocks, slot, head, k_map, geometry, x)
        factor = _inverse_norm(x)
        for d in range(len(mean)):
            mean[d] += x[d] * factor
    factor = _inverse_norm(mean)
    for d in range(len(mean)):
        mean[d] *= factor


@njit
def _cosine_scores(elements, blocks, first, head, k_map, geometry, mean, score):
    """Scores of slots [first, first + n) by cosine with the mean direction."""
    x = np.empty(len(mean), np.float32)
    for i in range(len(score)):
        load_key(elements, blocks, first + i, head, k_map, geometry, x)
        dot = np.float32(0)
        for d in range(len(mean)):
            dot += x[d] * mean[d]
        cosine = dot * _inverse_norm(x)
        score[i] = np.int32((cosine + np.float32(1)) * COSINE_UNIT)


@inlined
def scan_block(
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
    which,
):
    """Score a block's slots, from ``first`` on, and keep the best of them.

    ``merged`` and ``best`` by number ``which``, see `cpu_scan`. ``scratch`` int32 [N]
    holds scores; where a rule has none of its own, the caller's.
    """
    block_size, words, size = geometry[1], geometry[3], row_size(geometry)
    count = min(block_size, num_slots - first)
    base = tail_of(blocks, first, head, geometry)
    position = base + words * size
    if rule[2] <= HAMMING_TO_QUERY:
        masks, odd = np.int64((group + 1) // 2), np.int64(group % 2)
        hamming_scores(
            tail, base, size, words, merged, which, masks, odd, scratch, count
        )
    elif rule[2] == VOTE:
        votes = position - size
        _vote_scores(tail[votes : votes + block_size], scratch)
    elif rule[2] == NORM:
        scratch[:] = tail[base : base + block_size]
    elif rule[2] == RANDOM:
        _random_scores(rule[3], t, tail[position : position + block_size], scratch)
    if largest_score(scratch, count) >= best[which, TOP]:
        lowest, highest = np.int64(rule[0]), np.int64(t) - 1 - rule[1]
        keep_best(scratch, tail, position, count, first, lowest, highest, best, which)


@njit
def _vote_scores(votes, score):
    """Fewest votes score highest; int32 [N], the bits of floats."""
    for i in range(len(score)):
        score[i] = np.int32(2**15 - 1) - (votes[i] >> np.int32(16))


@njit
def _random_scores(seed, t, position, score):
    """Scores that depend on nothing but the seed, the step and the position."""
    for i in range(len(score)):
        score[i] = _mix(seed, t, position[i])


@njit
def find_victim(
    elements,
    tail,
    blocks,
    num_slots,
    head,
    merged,
    group,
    t,
    k_map,
    geometry,
    rule,
    scratch,
    best,
):
    """The unprotected slot with the largest score; ties go to the oldest position.

    ``merged[0]`` are the ``group`` signatures compared with, merged by
    `hashevict_vllm.kernels.cpu_hamming`; positions below the sinks or above
    ``t - 1 - recent`` are protected, slots marked ``~position`` are dead. Scratch:
    ``scratch`` int32 [N], ``best`` int32 [1, BEST_SIZE].
    """
    block_size = geometry[1]
    mean = np.empty(geometry[2] if rule[2] == KEY_DIFF else 0, np.float32)
    if rule[2] == KEY_DIFF:
        _mean_direction(elements, tail, blocks, num_slots, head, k_map, geometry, mean)
    scratch[:] = np.int32(0)
    reset_best(best[0])
    for first in range(0, num_slots, block_size):
        if rule[2] == KEY_DIFF:
            here = scratch[: min(block_size, num_slots - first)]
            _cosine_scores(elements, blocks, first, head, k_map, geometry, mean, here)
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
            0,
        )
    return best_slot(best[0])
