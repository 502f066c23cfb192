"""Signatures, scores and the choice of the victim (numba); rules in `policies`.

A score is an int32 of at least 0, whatever bits keys have, so that there is always a
victim; the largest is evicted, ties go to the oldest.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hashevict_vllm.kernels.codes import (
    HAMMING_TO_QUERY,
    KEY_DIFF,
    NO_DIRECTION,
    NORM,
    NOT_A_NUMBER,
    RANDOM,
    SHORTEST,
    VOTE,
)
from hashevict_vllm.kernels.cpu.hamming import merge
from hashevict_vllm.kernels.cpu.hash import hash_row, pack_signs, project_rows
from hashevict_vllm.kernels.cpu.jit import inlined
from hashevict_vllm.kernels.cpu.scan import (
    TOP,
    best_slot,
    hamming_scores,
    keep_best,
    largest_score,
    reset_best,
)
from hashevict_vllm.kernels.cpu.slots import load_key, row_size, tail_of, word_of
from hashevict_vllm.kernels.cpu.tokens import load_queries

COSINE_UNIT = np.float32(2.0**29)
"""Integer steps of a cosine's score: (cos + 1) times this."""


@njit(fastmath={"contract", "reassoc"})
def square_of(x):
    """‖x‖² of float32 [D]."""
    square = np.float32(0)
    for d in range(len(x)):
        square += x[d] * x[d]
    return square


@inlined
def describe_key(x, rule, dots, words):
    """What a slot keeps of its key x [D] for later scores, into ``words`` [W].

    Votes describe keys in a frame: `hashevict_vllm.kernels.cpu.frame`.
    """
    if rule.score <= HAMMING_TO_QUERY:
        hash_row(x, rule.projection, dots, words)
    elif rule.score == NORM:
        square = square_of(x)
        words.view(np.float32)[0] = square  # its bits order as the float does
        if np.isnan(square):  # but for a NaN's, whose sign and rest may be any
            words[0] = np.int32(NOT_A_NUMBER)


@inlined
def merge_queries(pages, rule, tokens, row, head, scratch, merged):
    """Sign the G query heads of a KV head and merge their signatures.

    ``scratch`` is a `Scratch`; ``merged`` is written as `merge` does.
    """
    dots, sources = scratch.dots, scratch.sources
    group, b = sources.shape[0], rule.bits
    load_queries(pages, tokens, row, head, scratch.x)
    project_rows(scratch.x, rule.projection, dots, group)
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
def _inverse_norm(square):
    """1 / ‖x‖ of a finite ‖x‖², see `SHORTEST`."""
    return np.float32(1) / max(np.sqrt(square), np.float32(SHORTEST))


@njit
def _mean_direction(pages, blocks, num_slots, head, mean):
    """Normalised mean of the normalised keys of live slots, into ``mean`` [D].

    Keys without a direction (`NO_DIRECTION`) are left out.
    """
    x = np.empty(len(mean), np.float32)
    mean[:] = np.float32(0)
    last = pages.words * row_size(pages)
    for slot in range(num_slots):
        if pages.tail[word_of(pages, blocks, slot, head) + last] < 0:
            continue
        load_key(pages, blocks, slot, head, x)
        square = square_of(x)
        if not np.isfinite(square):
            continue
        factor = _inverse_norm(square)
        for d in range(len(mean)):
            mean[d] += x[d] * factor
    factor = _inverse_norm(square_of(mean))
    for d in range(len(mean)):
        mean[d] *= factor


@njit
def _cosine_scores(pages, blocks, first, head, mean, score):
    """Scores of slots [first, first + n) by cosine with the mean direction."""
    x = np.empty(len(mean), np.float32)
    for i in range(len(score)):
        load_key(pages, blocks, first + i, head, x)
        dot = np.float32(0)
        for d in range(len(mean)):
            dot += x[d] * mean[d]
        square = square_of(x)
        if not np.isfinite(square):
            score[i] = np.int32(NO_DIRECTION)
            continue
        cosine = dot * _inverse_norm(square)
        score[i] = np.int32((cosine + np.float32(1)) * COSINE_UNIT)


@inlined
def scan_block(
    pages, rule, blocks, first, num_slots, head, t, recent, merged, score, best
):
    """Score a block's slots, from ``first`` on, and keep the best of them.

    The ``recent`` positions before ``t`` are protected. Of ``merged`` [H, .., W] and
    ``best`` [H, BEST_SIZE] row ``head`` is used, see `scan`. ``score`` int32 [N]: where
    a rule has no scores, the caller's count.
    """
    block_size, words, size = pages.block_size, pages.words, row_size(pages)
    count, tail = min(block_size, num_slots - first), pages.tail
    base = tail_of(pages, blocks, first, head)
    position = base + words * size
    if rule.score <= HAMMING_TO_QUERY:
        group = np.int64(merged.shape[1] - 2)
        masks, odd = np.int64((group + 1) // 2), np.int64(group % 2)
        hamming_scores(tail, base, size, words, merged, head, masks, odd, score, count)
    elif rule.score == VOTE:
        votes = position - size
        _vote_scores(tail[votes : votes + block_size], score)
    elif rule.score == NORM:
        score[:] = tail[base : base + block_size]
    elif rule.score == RANDOM:
        _random_scores(rule.seed, t, tail[position : position + block_size], score)
    if largest_score(score, count) >= best[head, TOP]:
        lowest, highest = np.int64(rule.sinks), np.int64(t) - 1 - recent
        keep_best(score, tail, position, count, first, lowest, highest, best, head)


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
def find_victim(pages, rule, blocks, num_slots, head, t, recent, merged, score, best):
    """The unprotected slot with the largest score; ties go to the oldest position.

    Positions below the sinks or above ``t - 1 - recent`` are protected, slots marked
    ``~position`` are dead. Arguments as `scan_block`; ``score`` and ``best`` are
    scratch.
    """
    block_size, distinct = pages.block_size, rule.score == KEY_DIFF
    mean = np.empty(pages.dim if distinct else 0, np.float32)
    if distinct:
        _mean_direction(pages, blocks, num_slots, head, mean)
    score[:] = np.int32(0)
    reset_best(best[head])
    for first in range(0, num_slots, block_size):
        if distinct:
            here = score[: min(block_size, num_slots - first)]
            _cosine_scores(pages, blocks, first, head, mean, here)
        scan_block(
            pages,
            rule,
            blocks,
            first,
            num_slots,
            head,
            t,
            recent,
            merged,
            score,
            best,
        )
    return best_slot(best[head])
