"""The frame in which keys are described (`hashevict_vllm.policies.frame.KeyFrame`).

Sinks are appended first and never evicted or moved, so slot i holds position i, and the
frame can be made again from the pages at every step. All of it is float64: whether the
oracle and a kernel round a number alike must not hang on the order of a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels.codes import PARALLEL
from hashevict_vllm.kernels.triton.pieces import COUNT, NUM_COLUMNS, START
from hashevict_vllm.kernels.triton.slots import head_of, key_rows, load_elements

FRAME_VECTORS = tl.constexpr(3)
"""Centre and two axes."""

_PARALLEL = tl.constexpr(PARALLEL)
_AT_ONCE = tl.constexpr(4)


@triton.jit
def load_key(page, elements, used):
    """Elements of stored keys in float64, 0 where not used.

    Args:
        page: `Page`; an fp8 cache is multiplied by its scale.
        elements: int64, of any shape, see `key_rows`.
        used: bool, of that shape.

    """
    return load_elements(page.k, page.k_scale, elements, used).to(tl.float64)


@triton.jit
def _finite(x):
    """X with 0 in the place of elements that are not finite."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _unit(x):
    """X float64 [D] made of length 1; 0 stays 0."""
    length = tl.sqrt(tl.sum(x * x, 0))
    return x / tl.where(length > 0, length, 1.0)


@triton.jit
def write_frame(frame, at, rule: tl.constexpr, sizes: tl.constexpr):
    """Write the frame of one request and KV head. Ends with a barrier.

    Args:
        frame: float64 pointer [3, D], written: centre, then the axes.
        at: `Head`; all sinks must be there.
        rule: `DeviceRule`.
        sizes: `Sizes`.

    """
    padded: tl.constexpr = sizes.dim_padded
    d = tl.arange(0, padded)
    first = tl.zeros([padded], tl.float64)
    centre = tl.zeros([padded], tl.float64)
    for begin in range(0, rule.sinks, _AT_ONCE):
        for i in tl.static_range(_AT_ONCE):  # loads that do not wait for each other
            slot, used = begin + i, begin + i < rule.sinks
            row = key_rows(at.page, at.table, at.index, slot, used, sizes)
            x = load_key(at.page, row + d, used & (d < sizes.dim))
            first += tl.where(slot == 0, x, 0.0)
            centre += tl.where(slot == 0, 0.0, x)
    centre = _finite(centre / max(rule.sinks - 1, 1))
    one = _unit(_finite(first))
    other = centre - tl.sum(centre * one, 0) * one
    parallel = tl.sum(other * other, 0) <= tl.sum(centre * centre, 0) * _PARALLEL
    two = _unit(tl.where(parallel, 0.0, other))
    tl.store(frame + d, centre, mask=d < sizes.dim)
    tl.store(frame + sizes.dim + d, one, mask=d < sizes.dim)
    tl.store(frame + 2 * sizes.dim + d, two, mask=d < sizes.dim)
    tl.debug_barrier()


@triton.jit
def frame_kernel(frames, step, page, rule: tl.constexpr, sizes: tl.constexpr):
    """One program: the frame of one piece and KV head, once all its sinks are there.

    Args:
        frames: float64 [P, Hkv, 3, D], written.
        step: `Step`.
        page: `Page`.
        rule: `DeviceRule`.
        sizes: `Sizes`.

    """
    index, head = tl.program_id(0), tl.program_id(1)
    piece = step.pieces + index * NUM_COLUMNS
    count = tl.load(piece + COUNT)
    if (count == 0) | (tl.load(piece + START) + count < rule.sinks):
        return
    frame = frames + (index * step.heads + head) * (FRAME_VECTORS * sizes.dim)
    write_frame(frame, head_of(step, page, piece, head), rule, sizes)
