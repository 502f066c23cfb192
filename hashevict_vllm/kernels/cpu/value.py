"""What values count: credit when a segment is reduced, votes in decode (numba).

See `hashevict_vllm.policies.value` for the rule.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hashevict_vllm.kernels.codes import (
    BEFORE_THE_END,
    BESIDE,
    LONGEST,
    LOWEST_OCTAVE,
    OCTAVES,
)
from hashevict_vllm.kernels.cpu.jit import inlined
from hashevict_vllm.kernels.cpu.slots import load_value, row_size, tail_of


@inlined
def _square_apart(x, mean):
    """Squared distance of x from mean, both [D], float64; 0 if it is not finite."""
    square = np.float64(0)
    for d in range(len(mean)):
        apart = np.float64(x[d]) - mean[d]
        square += apart * apart
    return square if square <= LONGEST else np.float64(0)


@njit
def _distances(pages, blocks, head, order, first, apart):
    """Squared distances of values from their mean, into ``apart`` [n].

    Args:
        pages: `Pages`.
        blocks: int32 [..], of the request.
        head: KV head.
        order: int64 [n], slots by position.
        first: Number of sinks among them; they have no part in the mean.
        apart: float64 [n], written.

    """
    n, mean = len(order), np.zeros(pages.dim, np.float64)
    x = np.empty(pages.dim, np.float32)
    for i in range(first, n):
        load_value(pages, blocks, order[i], head, x)
        for d in range(pages.dim):
            mean[d] += x[d]
    for d in range(pages.dim):
        mean[d] /= max(n - first, 1)
    for i in range(n):
        load_value(pages, blocks, order[i], head, x)
        apart[i] = _square_apart(x, mean)


@njit
def add_credit(pages, rule, blocks, head, position, order, goes_on, budget, merit):
    """Add every slot's credit to its ``merit``.

    Args:
        pages: `Pages`.
        rule: `Rule`.
        blocks: int32 [..], of the request.
        head: KV head.
        position: int32 [n], in ascending order.
        order: int64 [n], the slots of these positions.
        goes_on: Whether the prompt does.
        budget: C.
        merit: float32 [n], changed.

    """
    n, first = len(position), 0
    while first < n and position[first] < rule.sinks:
        first += 1
    apart, smooth = np.empty(n, np.float64), np.empty(n, np.float64)
    _distances(pages, blocks, head, order, first, apart)
    total = np.float64(0)
    for i in range(n):
        summed, count = np.float64(0), 0
        for j in range(max(i - BESIDE, 0), min(i + BESIDE + 1, n)):
            if abs(position[j] - position[i]) <= BESIDE and apart[j] > 0:
                summed += apart[j]
                count += 1
        smooth[i] = summed / max(count, 1)
        total += smooth[i] if i >= first else np.float64(0)
    mean = total / max(n - first, 1)
    kept = np.float64(budget) / np.float64(n)
    weight = np.float64(rule.credit) * kept * (1 - kept) * (1 - kept) / n
    if goes_on:
        weight *= BEFORE_THE_END
    for i in range(n):
        ratio = smooth[i] / mean if mean > 0 else np.float64(0)
        given = weight * ratio * ratio
        merit[i] += np.float32(given if given <= LONGEST else 0)


@njit(fastmath={"contract", "reassoc"})
def octave_of(x):
    """Octave of the squared norm of a value, float32 [D] (`policies.value.octaves`)."""
    square = np.float64(0)
    for d in range(len(x)):
        square += np.float64(x[d]) * np.float64(x[d])
    exponent = np.int64(np.float32(square).view(np.int32) >> 23 & 255) - 127
    return np.int32(min(max(exponent - LOWEST_OCTAVE, np.int64(0)), np.int64(OCTAVES)))


@njit(fastmath={"contract", "reassoc"})
def add_spread(pages, blocks, num_slots, head, own, share, votes):
    """Spread votes over slots by the octaves of their values.

    Args:
        pages: `Pages`.
        blocks: int32 [..], of the request.
        num_slots: n, live slots.
        head: KV head.
        own: The voter's slot, which gets none; n if it has none.
        share: Votes in sum, float32.
        votes: float32 [>= n], changed.

    """
    block_size, row = pages.block_size, (pages.words - 1) * row_size(pages)
    bits = np.empty(num_slots, np.int32)
    for first in range(0, num_slots, block_size):
        count = min(block_size, num_slots - first)
        at = tail_of(pages, blocks, first, head) + row
        word = pages.tail[at : at + count]
        here = bits[first : first + count]
        for i in range(count):
            octave = (word[i] & np.int32(OCTAVES)) + np.int32(127 + LOWEST_OCTAVE)
            here[i] = octave << np.int32(23)
    if own < num_slots:
        bits[own] = 0
    size = bits.view(np.float32)
    total = np.float32(0)
    for i in range(num_slots):
        total += size[i]
    if total > 0:
        factor = share / total
        for i in range(num_slots):
            votes[i] += size[i] * factor
