"""The frame in which the vote rule describes keys (numba).

See `hashevict_vllm.policies.frame`: sinks are appended first and never evicted or
moved, so slot i holds position i, and their keys can be read again from the page at
every step. The worker keeps nothing per request. A frame is float64 [3 D]: the centre
and two axes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hashevict_vllm.kernels.codes import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    LONGEST,
    PARALLEL,
    UNDESCRIBED,
)
from hashevict_vllm.kernels.cpu.hash import hash_row
from hashevict_vllm.kernels.cpu.jit import inlined
from hashevict_vllm.kernels.cpu.slots import (
    FP16_REBIAS,
    elements_of,
    load_key,
    prefetch_rows,
    row_size,
    tail_of,
    word_of,
)
from hashevict_vllm.kernels.cpu.vector import LANES, sum_of_run

AT_ONCE = 16
"""Slots that are described together where tokens come one by one.

A single token's key is described when it completes a group of so many slots, with the
others of it, so that full blocks, which requests may share, are complete; a run of
tokens is described at once. What is left is described by the ballot that reads it
(`describe_missing`), as are tokens that overwrite a slot. The frame is made once for
all of them, and requests that end below their budget pay next to nothing.
"""

TAILS_AHEAD = 8
"""Blocks whose tails are asked for ahead of the search for what is not described."""

_FAST = {"contract", "reassoc", "nsz"}


@njit
def adjacent_keys(k_map, sinks):
    """Which lanes of a run of keys the centre is the mean of, where keys lie in runs.

    Where an element of consecutive keys is consecutive in memory (the stock layout of
    most CPUs), a run of them is read at once.

    Returns:
        uint32 [n], all bits of slots [1, sinks) set, n a multiple of 16; empty where
        keys do not lie so.

    """
    slots, dim = k_map.shape
    for slot in range(1, min(sinks, slots)):
        first, here = k_map[0], k_map[slot]
        for d in range(dim):
            if here[d] - first[d] != slot:
                return np.zeros(0, np.uint32)
    lanes = np.zeros((sinks + LANES - 1) // LANES * LANES, np.uint32)
    lanes[1:sinks] = np.uint32(0xFFFFFFFF)
    return lanes


@njit
def _add_runs(page, starts, lanes, kind, centre):
    """Add the chosen lanes of a run of 16 keys; ``starts`` [D], its first elements."""
    sign, rest, shift = np.uint32(0), np.uint32(0xFFFFFFFF), np.uint32(0)
    if kind == BFLOAT16:
        rest, shift = np.uint32(0xFFFF), np.uint32(16)
    elif kind == FLOAT16:
        sign, rest, shift = np.uint32(0x8000), np.uint32(0x7FFF), np.uint32(13)
    for d in range(len(centre)):
        at = np.int64(starts[d])
        centre[d] += sum_of_run(page, at, lanes, sign, rest, shift)


@njit
def _centre(pages, blocks, head, lanes, sinks, x, centre):
    """Mean key of slots [1, sinks) into ``centre`` float64 [D], 0 if there are none."""
    block_size, kind = pages.block_size, pages.kind
    centre[:] = 0.0
    if sinks < 2:
        return
    share = 1.0 / (sinks - 1)
    if len(lanes) and kind != FLOAT32:  # sums of so few short numbers are exact
        for slot in range(0, sinks, LANES):
            start = elements_of(pages, blocks, slot, head)
            page = pages.elements[start : start + 2 * block_size * len(centre)]
            chosen = lanes[slot : slot + LANES]
            _add_runs(page, pages.k_map[slot % block_size], chosen, kind, centre)
        if kind == FLOAT16:
            share *= np.float64(FP16_REBIAS)
    else:
        for slot in range(1, sinks):
            load_key(pages, blocks, slot, head, x)
            for d in range(len(x)):
                centre[d] += x[d]
    for d in range(len(centre)):
        centre[d] *= share


@njit(fastmath=_FAST)
def _dot(x, y):
    """Scalar product of two float64 [D]."""
    total = 0.0
    for d in range(len(x)):
        total += x[d] * y[d]
    return total


@njit
def _normalise(x, square):
    """Divide float64 x [D] by the root of ``square``; by nothing if that is 0."""
    factor = 1.0 / np.sqrt(square) if square > 0.0 else 0.0
    for d in range(len(x)):
        x[d] *= factor


@njit
def _drop_infinite(x):
    """Put 0 in the place of elements of float64 x [D] that are not finite."""
    for d in range(len(x)):
        x[d] = x[d] if abs(x[d]) < np.inf else 0.0


@njit
def frame_of(pages, blocks, head, lanes, sinks, x, frame):
    """Write the frame of a (request, KV head), `KeyFrame.of`; all sinks must be there.

    ``lanes`` as `adjacent_keys`; ``x`` float32 [D] is scratch; ``frame`` float64 [3 D].
    """
    dim = len(x)
    centre, one, other = frame[:dim], frame[dim : 2 * dim], frame[2 * dim : 3 * dim]
    _centre(pages, blocks, head, lanes, sinks, x, centre)
    one[:] = 0.0
    if sinks:
        load_key(pages, blocks, 0, head, x)
        for d in range(dim):
            one[d] = x[d]
    _drop_infinite(centre)
    _drop_infinite(one)
    _normalise(one, _dot(one, one))
    shared = _dot(centre, one)
    for d in range(dim):
        other[d] = centre[d] - shared * one[d]
    square = _dot(other, other)
    if square <= PARALLEL * _dot(centre, centre):
        square = 0.0
    _normalise(other, square)


@njit(fastmath=_FAST)
def _coordinates(x, centre, one, other):
    """Coordinates along both axes of the centred x float32 [D]."""
    first, second = 0.0, 0.0
    for d in range(len(x)):
        centred = np.float64(x[d]) - centre[d]
        first += centred * one[d]
        second += centred * other[d]
    return first, second


@njit(fastmath=_FAST)
def _take_rest(x, centre, one, other, first, second):
    """Leave of x float32 [D] the rest; returns its square in float64."""
    square = 0.0
    for d in range(len(x)):
        rest = np.float64(x[d]) - centre[d] - first * one[d] - second * other[d]
        square += rest * rest
        x[d] = np.float32(rest)
    return square


@njit
def _pack(first, second, length):
    """`Described.words` of float64 coordinates and length, 0 <= length."""
    finite = abs(first) <= LONGEST and abs(second) <= LONGEST and length <= LONGEST
    if not finite:
        return np.int32(0)
    largest = np.float32(max(abs(first), abs(second), length))
    exponent = (largest.view(np.int32) >> 23) - 6
    if exponent <= 0:
        return np.int32(0)
    share = 1.0 / np.float64(np.int32(exponent << 23).view(np.float32))
    a = min(max(np.floor(first * share + 0.5), -127.0), 127.0)
    b = min(max(np.floor(second * share + 0.5), -127.0), 127.0)
    c = np.int64(np.floor(length * share + 0.5))
    low = (np.int64(a) & 255) | (np.int64(b) & 255) << 8 | c << 16
    return np.int32(low | np.int64(exponent) << 24)


@njit
def describe_in(x, frame, projection, dots, words):
    """Signature and numbers of a key x [D], and no votes, into ``words`` [W].

    `KeyFrame.describe`; ``x`` float32 becomes the rest; ``dots`` [b] is scratch.
    """
    dim, hashed = len(x), len(words) - 2
    centre, one, other = frame[:dim], frame[dim : 2 * dim], frame[2 * dim : 3 * dim]
    first, second = _coordinates(x, centre, one, other)
    square = _take_rest(x, centre, one, other, first, second)
    packed = _pack(first, second, np.sqrt(square))
    if (packed >> 16) & 255 == 0:
        x[:] = np.float32(0)
    hash_row(x, projection, dots, words[:hashed])
    words[hashed] = packed
    words[hashed + 1] = 0


@inlined
def last_group(end):
    """First slot of the last, incomplete group of slots before ``end``."""
    return end // AT_ONCE * AT_ONCE


@inlined
def leave_undescribed(words):
    """What a slot keeps until a ballot describes it, into ``words`` [W]; no votes."""
    words[:] = 0
    words[len(words) - 2] = UNDESCRIBED


@njit
def describe_slots(pages, rule, blocks, first, end, head, frame, scratch):
    """Describe the keys of slots [first, end), which are there; votes stay."""
    size, words = row_size(pages), scratch.words
    for slot in range(first, end):
        load_key(pages, blocks, slot, head, scratch.x)
        describe_in(scratch.x, frame, rule.projection, scratch.key_dots, words)
        at = word_of(pages, blocks, slot, head)
        for w in range(len(words) - 1):
            pages.tail[at + w * size] = words[w]


@njit
def describe_missing(pages, rule, blocks, num_slots, head, frame, scratch):
    """Describe those of the first ``num_slots`` slots that nobody has described.

    It is the first to look at a page's tail, of which the ballot will read all.
    """
    block_size, row = pages.block_size, (pages.words - 2) * row_size(pages)
    ahead, rows = TAILS_AHEAD * block_size, pages.words + 1
    prefetch_rows(pages, blocks, 0, min(num_slots, ahead), head, 0, rows)
    for first in range(0, num_slots, block_size):
        end = min(num_slots, first + ahead + block_size)
        prefetch_rows(pages, blocks, first + ahead, end, head, 0, rows)
        at = tail_of(pages, blocks, first, head) + row
        packed = pages.tail[at : at + min(block_size, num_slots - first)]
        missing = np.int32(0)
        for i in range(len(packed)):
            missing += np.int32(packed[i] == UNDESCRIBED)
        for i in range(len(packed) if missing else 0):
            if packed[i] == UNDESCRIBED:
                slot = first + i
                describe_slots(
                    pages, rule, blocks, slot, slot + 1, head, frame, scratch
                )


@njit
def split_queries(x, frame, group, along):
    """Take queries apart, `KeyFrame.split`.

    Args:
        x: float32 [G * D], flat; becomes their rests.
        frame: float64 [3 D].
        group: G.
        along: float32 [G * 2], written: coordinates along the axes.

    """
    dim = len(x) // group
    one, other = np.empty(dim, np.float32), np.empty(dim, np.float32)
    for d in range(dim):
        one[d], other[d] = frame[dim + d], frame[2 * dim + d]
    for g in range(group):
        _split_query(x[g * dim : (g + 1) * dim], one, other, along[2 * g : 2 * g + 2])


@njit(fastmath=_FAST)
def _split_query(x, one, other, along):
    first, second = np.float32(0), np.float32(0)
    for d in range(len(x)):
        first += x[d] * one[d]
        second += x[d] * other[d]
    for d in range(len(x)):
        x[d] -= first * one[d] + second * other[d]
    along[0], along[1] = first, second
