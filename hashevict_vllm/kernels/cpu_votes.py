"""Votes of queries on slots, and the selection at the end of a segment (numba).

See `hashevict_vllm.policies.vote` for the rule. A slot's words are its signature, the
norm of its centred key and its votes; the last two are float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from hashevict_vllm.kernels.cpu_scores import project_row
from hashevict_vllm.kernels.cpu_slots import load, tail_of
from hashevict_vllm.kernels.jit import inlined
from hashevict_vllm.policies.vote import AHEAD, SMOOTH

_LOG2_E = np.float32(1.4426950408889634)


@intrinsic
def _float_of_bits(typingctx: Any, value: Any) -> Any:
    """The float32 whose bits an int32 holds."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def _signed_by(typingctx: Any, value: Any, word: Any, lift: Any) -> Any:
    """A float32, negated unless bit ``31 - lift`` of an int32 word is set.

    Shift, and, xor: a select, or a product with a converted bit, is twice as slow.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32 = ir.IntType(32)
        lifted = builder.shl(builder.not_(args[1]), args[2])
        sign = builder.and_(lifted, ir.Constant(i32, 1 << 31))
        bits = builder.xor(builder.bitcast(args[0], i32), sign)
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.float32, types.int32, types.int32), codegen


@inlined
def _exp(x):
    """exp(x) for x <= 0 within 3e-7, in operations that vectorise."""
    y = max(x * _LOG2_E, np.float32(-126.0))
    n = np.floor(y + np.float32(0.5))
    r = np.float32((y - n) * np.float32(0.6931471805599453))
    p = np.float32(1.0 / 5040)
    p = p * r + np.float32(1.0 / 720)
    p = p * r + np.float32(1.0 / 120)
    p = p * r + np.float32(1.0 / 24)
    p = p * r + np.float32(1.0 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    return p * _float_of_bits(np.int32((np.int32(n) + np.int32(127)) << 23))


@njit(fastmath={"contract", "reassoc", "nsz"})
def _logits(signatures, norms, projected, factor, logits):
    """Estimated logits of a block's n slots, factor |k| sum_j t_j s_j; their maximum.

    ``signatures`` int32 [W * N], ``norms`` and ``logits`` float32 [n], ``projected``
    (t = q R) float32 [b].
    """
    count, b = len(logits), len(projected)
    block_size = len(signatures) // ((b + 31) // 32)
    logits[:] = np.float32(0)
    for w in range((b + 31) // 32):
        row = signatures[w * block_size : w * block_size + count]
        t = projected[w * 32 : min(w * 32 + 32, b)]
        for j in range(0, len(t) - 3, 4):  # b is a multiple of 4
            lift = np.int32(31 - j)
            t0, t1, t2, t3 = t[j], t[j + 1], t[j + 2], t[j + 3]
            for i in range(count):
                logits[i] += (
                    _signed_by(t0, row[i], lift)
                    + _signed_by(t1, row[i], lift - np.int32(1))
                ) + (
                    _signed_by(t2, row[i], lift - np.int32(2))
                    + _signed_by(t3, row[i], lift - np.int32(3))
                )
    top = np.float32(-np.inf)
    for i in range(count):
        logits[i] *= factor * norms[i]
        top = max(top, logits[i])
    return top


@njit(fastmath={"contract", "reassoc", "nsz"})
def _softmax_into(logits, top, weights, votes):
    """Raise ``votes`` to at least softmax(logits); all float32 [n], one scratch."""
    total = np.float32(0)
    for i in range(len(logits)):
        weights[i] = _exp(logits[i] - top)
        total += weights[i]
    share = np.float32(1) / total
    for i in range(len(logits)):
        votes[i] = max(votes[i], weights[i] * share)


@njit
def _fade(tail, blocks, num_slots, head, geometry, decay, oldest_new):
    """Decay votes; slots from position ``oldest_new`` on get the mean of the others."""
    block_size, words = geometry[1], geometry[3]
    as_float = tail.view(np.float32)
    total, others = np.float32(0), 0
    for first in range(0, num_slots, block_size):
        count = min(block_size, num_slots - first)
        at = tail_of(blocks, first, head, geometry) + (words - 1) * block_size
        votes = as_float[at : at + count]
        position = tail[at + block_size : at + block_size + count]
        for i in range(count):
            old = position[i] < oldest_new
            votes[i] *= decay
            total += votes[i] if old else np.float32(0)
            others += np.int64(old)
    mean = total / np.float32(others) if others else np.float32(0)
    for first in range(0, num_slots, block_size):
        count = min(block_size, num_slots - first)
        at = tail_of(blocks, first, head, geometry) + (words - 1) * block_size
        votes = as_float[at : at + count]
        position = tail[at + block_size : at + block_size + count]
        for i in range(count):
            votes[i] = votes[i] if position[i] < oldest_new else mean


@njit
def cast_votes(
    tail, q, row, blocks, num_slots, head, projection, geometry, rule, strengths, t
):
    """Let the G queries of a row vote on the first ``num_slots`` slots of a request.

    ``strengths`` float32 [2]: factor of a logit, decay. ``t`` is the position of a
    decoding token, whose ballot first fades earlier votes; negative in a segment.
    """
    block_size, words = geometry[1], geometry[3]
    hashed = words - 2
    group = q.shape[1] // geometry[0]
    as_float = tail.view(np.float32)
    x, dots = np.empty(geometry[2], np.float32), np.empty(geometry[8], np.float32)
    logits, weights = np.empty(num_slots, np.float32), np.empty(num_slots, np.float32)
    votes = np.zeros(num_slots, np.float32)
    for g in range(group):
        load(q[row, head * group + g], geometry[7], x)
        project_row(x, projection, dots)
        top = np.float32(-np.inf)
        for first in range(0, num_slots, block_size):
            end = min(first + block_size, num_slots)
            base = tail_of(blocks, first, head, geometry)
            at = base + hashed * block_size
            signatures = tail[base:at]
            norms = as_float[at : at + end - first]
            here = _logits(signatures, norms, dots, strengths[0], logits[first:end])
            top = max(top, here)
        _softmax_into(logits, top, weights, votes)
    if t >= 0:
        new = t - rule[5]
        _fade(tail, blocks, num_slots, head, geometry, strengths[1], new)
    for first in range(0, num_slots, block_size):
        end = min(first + block_size, num_slots)
        at = tail_of(blocks, first, head, geometry) + (hashed + 1) * block_size
        kept, new_votes = as_float[at : at + end - first], votes[first:end]
        for i in range(end - first):
            kept[i] += new_votes[i]


@njit
def _pool(position, votes, pool):
    """Smooth and pool votes [n] of slots sorted by ``position``; float32 [n]."""
    n = len(position)
    smooth, pooled = np.empty(n, np.float32), np.empty(n, np.float32)
    if pool == 1:
        pooled[:] = votes
        return pooled
    share = np.float32(1) / np.float32(2 * SMOOTH + 1)
    first = 0
    for i in range(n):
        while position[i] - position[first] > SMOOTH:
            first += 1
        total = np.float32(0)
        j = first
        while j < n and position[j] - position[i] <= SMOOTH:
            total += votes[j]
            j += 1
        smooth[i] = total * share
    first = 0
    for i in range(n):
        while position[i] - position[first] >= pool - AHEAD:
            first += 1
        best = np.float32(0)
        j = first
        while j < n and position[j] - position[i] <= AHEAD:
            best = max(best, smooth[j])
            j += 1
        pooled[i] = best
    return pooled


@njit
def mark_losers(tail, blocks, num_slots, head, end, geometry, rule, budget):
    """Mark all but ``budget`` of the slots ``~position``: those with fewest votes.

    Votes are pooled over ``rule[4]`` positions (`hashevict_vllm.policies.vote`), and
    stay so; sinks and positions of at least ``end - recent`` are protected; ties keep
    the newer slot.
    """
    block_size, words = geometry[1], geometry[3]
    position = np.empty(num_slots, np.int32)
    votes = np.empty(num_slots, np.float32)
    as_float = tail.view(np.float32)
    for slot in range(num_slots):
        at = tail_of(blocks, slot, head, geometry) + slot % block_size
        position[slot] = tail[at + words * block_size]
        votes[slot] = as_float[at + (words - 1) * block_size]
    order = np.argsort(position)
    pooled = _pool(position[order], votes[order], rule[4])
    for i in range(num_slots):
        at = tail_of(blocks, order[i], head, geometry) + order[i] % block_size
        as_float[at + (words - 1) * block_size] = pooled[i]
    ranked = np.argsort(pooled, kind="mergesort")
    left = num_slots - budget
    for i in ranked:
        slot = order[i]
        if left == 0:
            break
        if position[slot] < rule[0] or position[slot] >= end - rule[1]:
            continue
        at = tail_of(blocks, slot, head, geometry) + slot % block_size
        tail[at + words * block_size] = ~position[slot]
        left -= 1
