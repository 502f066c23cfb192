"""Votes of queries on slots, and the selection at the end of a segment (numba).

See `hashevict_vllm.policies.vote` for the rule. A slot's words are the signature of the
rest of its key, three small numbers (`hashevict_vllm.policies.frame`) and its votes, a
float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from hashevict_vllm.kernels.cpu_frame import split_queries
from hashevict_vllm.kernels.cpu_hash import project_rows
from hashevict_vllm.kernels.cpu_scores import load_queries
from hashevict_vllm.kernels.cpu_slots import tail_of
from hashevict_vllm.kernels.cpu_vector import add_rows, double_table
from hashevict_vllm.kernels.jit import inlined
from hashevict_vllm.policies.vote import AHEAD, SMOOTH

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


@inlined
def _signed_byte(word):
    """The low byte, from -128 to 127; a shift's result is wider than 32 bits here."""
    return np.int32(((word & np.int32(255)) ^ np.int32(128)) - np.int32(128))


@njit
def _fill_tables(projected, b, group, first, tables):
    """What every byte of a signature adds to the logits of four queries.

    Args:
        projected: t = q R of all G queries, float32 [G * b].
        b: Bits of a signature.
        group: G.
        first: First of the four queries; those beyond G, and bits beyond b, add zero.
        tables: float32 [4 W * 256 * 4], written: for each byte of a signature, each of
            its values and each query, sum_j t_j s_j over the byte's bits.

    """
    steps = np.zeros(4, np.float32)
    for byte in range(len(tables) // 1024):
        table = tables[byte * 1024 : byte * 1024 + 1024]
        table[:4] = np.float32(0)
        size = 4
        for j in range(byte * 8, byte * 8 + 8):
            for g in range(4):
                known = first + g < group and j < b
                steps[g] = projected[(first + g) * b + j] if known else np.float32(0)
            double_table(table, size, steps)
            size *= 2


@njit(fastmath={"contract", "reassoc", "nsz"})
def _logits_of(sums, query, packed, factor, along, logits):
    """Logits of one of four queries; their maximum.

    Args:
        sums: float32 [n * 4], sum_j t_j s_j.
        query: Which of the four.
        packed: int32 [n], see `Described.words`.
        factor: What length and sum are multiplied by.
        along: float32 [2], the query's coordinates, scaled.
        logits: float32 [n], written.

    """
    ordered = logits.view(np.int32)
    first, second = along[0], along[1]
    top = np.int32(-(2**31))
    for i in range(len(logits)):
        word = packed[i]
        step = _float_of_bits((word >> np.int32(1)) & np.int32(0x7F800000))
        a = np.float32(_signed_byte(word))
        b = np.float32(_signed_byte(word >> np.int32(8)))
        length = np.float32((word >> np.int32(16)) & np.int32(255))
        hashed = length * factor * sums[4 * i + query]
        logits[i] = step * (hashed + a * first + b * second)
    for i in range(len(logits)):
        # A float's bits order as it does, once those of negative ones are turned round.
        bits = ordered[i]
        top = max(top, bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return _float_of_bits(top ^ ((top >> np.int32(31)) & np.int32(0x7FFFFFFF)))


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


@njit(fastmath={"contract", "reassoc", "nsz"})
def _sum_old(votes, position, oldest_new):
    """Sum and number of the votes [n] of slots before position ``oldest_new``."""
    total, others = np.float32(0), np.int32(0)
    for i in range(len(votes)):
        old = position[i] < oldest_new
        total += votes[i] if old else np.float32(0)
        others += np.int32(old)
    return total, others


@njit(fastmath={"contract"})
def _fade_and_add(votes, position, oldest_new, decay, mean, new_votes):
    """Decay votes [n], or set those of new slots to ``mean``, and add the new ones."""
    for i in range(len(votes)):
        kept = votes[i] * decay if position[i] < oldest_new else mean
        votes[i] = kept + new_votes[i]


@njit
def cast_votes(
    tail,
    q,
    row,
    blocks,
    num_slots,
    head,
    projection,
    geometry,
    rule,
    strengths,
    frame,
    t,
):
    """Let the G queries of a row vote on the first ``num_slots`` slots of a request.

    ``strengths`` float32 [3]: factor of the hashed part of a logit, decay, softmax
    scale. ``frame`` float64 [3 D]. ``t`` is the position of a decoding token, whose
    ballot first fades earlier votes; negative in a segment.
    """
    block_size, words = geometry[1], geometry[3]
    hashed = words - 2
    group = q.shape[1] // geometry[0]
    dim, bits = geometry[2], geometry[8]
    as_float = tail.view(np.float32)
    x, projected = np.empty(group * dim, np.float32), np.empty(group * bits, np.float32)
    tables = np.empty(hashed * 4096, np.float32)
    sums = np.empty(4 * block_size, np.float32)
    logits, tops = np.empty((4, num_slots), np.float32), np.empty(4, np.float32)
    weights, votes = np.empty(num_slots, np.float32), np.zeros(num_slots, np.float32)
    along = np.empty(2 * group, np.float32)
    load_queries(q, row, head, geometry, x)
    split_queries(x, frame, group, along)
    along *= strengths[2]
    project_rows(x, projection, projected, group)
    for first_query in range(0, group, 4):
        four = min(4, group - first_query)
        _fill_tables(projected, bits, group, first_query, tables)
        tops[:] = np.float32(-np.inf)
        for first in range(0, num_slots, block_size):
            end = min(first + block_size, num_slots)
            base = tail_of(blocks, first, head, geometry)
            here = sums[: 4 * (end - first)]
            here[:] = np.float32(0)
            for w in range(hashed):
                at = base + w * block_size
                signatures = tail[at : at + end - first]
                add_rows(signatures, tables[w * 4096 : w * 4096 + 4096], here)
            at = base + hashed * block_size
            packed = tail[at : at + end - first]
            for g in range(four):
                coordinates = along[2 * (first_query + g) : 2 * (first_query + g) + 2]
                top = _logits_of(
                    here, g, packed, strengths[0], coordinates, logits[g, first:end]
                )
                tops[g] = max(tops[g], top)
        for g in range(four):
            _softmax_into(logits[g], tops[g], weights, votes)
    # In a segment every slot is older than this, and nothing fades.
    oldest_new, decay, mean = np.int32(2**31 - 1), np.float32(1), np.float32(0)
    if t >= 0:
        oldest_new, decay = np.int32(t - rule[5]), strengths[1]
        total, others = np.float32(0), 0
        for first in range(0, num_slots, block_size):
            count = min(block_size, num_slots - first)
            at = tail_of(blocks, first, head, geometry) + (hashed + 1) * block_size
            position = tail[at + block_size : at + block_size + count]
            here, old = _sum_old(as_float[at : at + count], position, oldest_new)
            total += here
            others += old
        mean = decay * total / np.float32(others) if others else np.float32(0)
    for first in range(0, num_slots, block_size):
        count = min(block_size, num_slots - first)
        at = tail_of(blocks, first, head, geometry) + (hashed + 1) * block_size
        position = tail[at + block_size : at + block_size + count]
        kept, new_votes = as_float[at : at + count], votes[first : first + count]
        _fade_and_add(kept, position, oldest_new, decay, mean, new_votes)


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
