"""Credit for unusual values, when a segment is reduced (numba).

See `hashevict_vllm.policies.value` for the rule.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hashevict_vllm.kernels.codes import BEFORE_THE_END, BESIDE, LONGEST
from hashevict_vllm.kernels.cpu.jit import inlined
from hashevict_vllm.kernels.cpu.slots import load_value


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
