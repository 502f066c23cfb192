"""Votes of queries on slots, and the selection at the end of a segment (numba).

See `hashevict_vllm.policies.vote` for the rule. A slot's words are its signature, the
norm of its key and its votes; the last two are float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from hashevict_vllm.kernels.cpu_scores import hash_row, popcount, square_of
from hashevict_vllm.kernels.cpu_slots import load, tail_of
from hashevict_vllm.kernels.jit import inlined

_LOG2_E = np.float32(1.4426950408889634)


@intrinsic
def _float_of_bits(typingctx: Any, value: Any) -> Any:
    """The float32 whose bits an int32 holds."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


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
def _logits(signatures, norms, source, strength, cosines, distance, logits):
    """Estimated logits of a block's n slots: strength |k| cos(pi h / b), and their max.

    ``signatures`` int32 [W * N], ``norms`` and ``logits`` float32 [n], ``source`` [W].
    """
    count, block_size = len(logits), len(signatures) // len(source)
    h = distance[:count]
    h[:] = np.int32(0)
    for w in range(len(source)):
        row, word = signatures[w * block_size : w * block_size + count], source[w]
        for i in range(count):
            h[i] += popcount(row[i] ^ word)
    top = np.float32(-np.inf)
    for i in range(count):
        logits[i] = strength * norms[i] * cosines[h[i]]
        top = max(top, logits[i])
    return top


@njit(fastmath={"contract", "reassoc", "nsz"})
def _softmax_into(logits, top, weights, votes):
    """Add softmax(logits) to ``votes``; both float32 [n], ``weights`` is scratch."""
    total = np.float32(0)
    for i in range(len(logits)):
        weights[i] = _exp(logits[i] - top)
        total += weights[i]
    share = np.float32(1) / total
    for i in range(len(logits)):
        votes[i] += weights[i] * share


@njit
def cast_votes(
    tail, q, row, blocks, num_slots, head, projection, geometry, strengths, distance
):
    """Let the G queries of a row vote on the first ``num_slots`` slots of a request.

    ``strengths`` float32 [2 + b + 1]: softmax scale, decay, cos(pi h / b).
    """
    if num_slots == 0:
        return
    block_size, words = geometry[1], geometry[3]
    hashed = words - 2
    group = q.shape[1] // geometry[0]
    as_float = tail.view(np.float32)
    x, dots = np.empty(geometry[2], np.float32), np.empty(geometry[8], np.float32)
    source = np.empty(hashed, np.int32)
    logits, weights = np.empty(num_slots, np.float32), np.empty(num_slots, np.float32)
    votes = np.zeros(num_slots, np.float32)
    cosines = strengths[2:]
    for g in range(group):
        load(q[row, head * group + g], geometry[7], x)
        hash_row(x, projection, dots, source)
        strength = strengths[0] * np.sqrt(square_of(x))
        top = np.float32(-np.inf)
        for first in range(0, num_slots, block_size):
            end = min(first + block_size, num_slots)
            base = tail_of(blocks, first, head, geometry)
            at = base + hashed * block_size
            signatures = tail[base:at]
            norms = as_float[at : at + end - first]
            out = logits[first:end]
            here = _logits(signatures, norms, source, strength, cosines, distance, out)
            top = max(top, here)
        _softmax_into(logits, top, weights, votes)
    for first in range(0, num_slots, block_size):
        end = min(first + block_size, num_slots)
        at = tail_of(blocks, first, head, geometry) + (hashed + 1) * block_size
        kept, new = as_float[at : at + end - first], votes[first:end]
        for i in range(end - first):
            kept[i] = kept[i] * strengths[1] + new[i]


@njit
def mark_losers(tail, blocks, num_slots, head, end, geometry, rule, budget):
    """Mark all but ``budget`` of the slots ``~position``: those with fewest votes.

    Votes are max-pooled over positions up to ``rule[4] // 2`` away, and stay so; sinks
    and positions of at least ``end - recent`` are protected; ties keep the newer slot.
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
    reach = rule[4] // 2
    pooled = np.empty(num_slots, np.float32)
    for i in range(num_slots):
        best = votes[order[i]]
        for step in (-1, 1):
            j = i + step
            while 0 <= j < num_slots and (
                abs(position[order[j]] - position[order[i]]) <= reach
            ):
                best = max(best, votes[order[j]])
                j += step
        pooled[i] = best
        slot = order[i]
        at = tail_of(blocks, slot, head, geometry) + slot % block_size
        as_float[at + (words - 1) * block_size] = best
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
