"""The frame in which keys are described (`hashevict_vllm.policies.frame.KeyFrame`).

Sinks are appended first and never evicted or moved, so slot i holds position i, and the
frame can be made again from the pages at every step. All of it is float64: whether the
oracle and a kernel round a number alike must not hang on the order of a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels.codes import PARALLEL
from hashevict_vllm.kernels.triton.pieces import COUNT, NUM_COLUMNS, REQUEST, START

FRAME_VECTORS = tl.constexpr(3)
"""Centre and two axes."""

_PARALLEL = tl.constexpr(PARALLEL)
_AT_ONCE = tl.constexpr(4)


@triton.jit
def key_rows(
    table, slots, used, head, block_stride, head_stride, slot_stride, N: tl.constexpr
):
    """Where stored keys begin, of one or of several: int64, in elements.

    Args:
        table: int32 pointer to the request's block numbers, or pointers.
        slots: int32, or of a shape.
        used: bool, likewise; for the others nothing is read and the row is not valid.
        head: KV head.
        block_stride: Elements between blocks of K.
        head_stride: Elements between heads of K in a page.
        slot_stride: Elements between slots of K.
        N: Slots of a block.

    """
    block = tl.load(table + slots // N, mask=used, other=0).to(tl.int64)
    return block * block_stride + head * head_stride + slots % N * slot_stride


@triton.jit
def load_key(k_cache, k_scale, elements, used):
    """Elements of stored keys in float64, 0 where not used.

    Args:
        k_cache: See `write_kernel`.
        k_scale: float32 [1], what fp8 slots are multiplied by; None for other dtypes.
        elements: int64, of any shape, see `key_rows`.
        used: bool, of that shape.

    """
    x = tl.load(k_cache + elements, mask=used, other=0.0).to(tl.float32)
    if k_scale is not None:
        x = x * tl.load(k_scale)
    return x.to(tl.float64)


@triton.jit
def _unit(x):
    """X float64 [D] made of length 1; 0 stays 0."""
    length = tl.sqrt(tl.sum(x * x, 0))
    return x / tl.where(length > 0, length, 1.0)


@triton.jit
def write_frame(
    frame,
    k_cache,
    k_scale,
    table,
    head,
    block_stride,
    head_stride,
    slot_stride,
    SINKS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    N: tl.constexpr,
):
    """Write the frame of one request and KV head. Ends with a barrier.

    Args:
        frame: float64 pointer [3, D], written: centre, then the axes.
        k_cache: See `load_key`; all sinks must be there.
        k_scale: See `load_key`.
        table: See `key_rows`.
        head: See `key_rows`.
        block_stride: See `key_rows`.
        head_stride: See `key_rows`.
        slot_stride: See `key_rows`.
        SINKS: Positions below are the sinks.
        DIM: D.
        DIM_PADDED: The power of two from D on.
        N: Slots of a block.

    """
    d = tl.arange(0, DIM_PADDED)
    first = tl.zeros([DIM_PADDED], tl.float64)
    centre = tl.zeros([DIM_PADDED], tl.float64)
    for begin in range(0, SINKS, _AT_ONCE):
        for i in tl.static_range(_AT_ONCE):  # loads that do not wait for each other
            slot, used = begin + i, begin + i < SINKS
            row = key_rows(
                table, slot, used, head, block_stride, head_stride, slot_stride, N
            )
            x = load_key(k_cache, k_scale, row + d, used & (d < DIM))
            first += tl.where(slot == 0, x, 0.0)
            centre += tl.where(slot == 0, 0.0, x)
    centre = centre / max(SINKS - 1, 1)
    one = _unit(first)
    other = centre - tl.sum(centre * one, 0) * one
    parallel = tl.sum(other * other, 0) <= tl.sum(centre * centre, 0) * _PARALLEL
    two = _unit(tl.where(parallel, 0.0, other))
    tl.store(frame + d, centre, mask=d < DIM)
    tl.store(frame + DIM + d, one, mask=d < DIM)
    tl.store(frame + 2 * DIM + d, two, mask=d < DIM)
    tl.debug_barrier()


@triton.jit
def frame_kernel(
    frames,
    pieces,
    block_table,
    k_cache,
    k_scale,
    num_heads,
    table_stride,
    block_stride,
    head_stride,
    slot_stride,
    SINKS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    N: tl.constexpr,
):
    """One program: the frame of one piece and KV head, once all its sinks are there.

    Args:
        frames: float64 [P, Hkv, 3, D], written.
        pieces: int32 [P, columns], see `pieces`.
        block_table: int32 [R, max blocks].
        k_cache: See `load_key`.
        k_scale: See `load_key`.
        num_heads: Hkv.
        table_stride: Elements between rows of the block table.
        block_stride: See `key_rows`.
        head_stride: See `key_rows`.
        slot_stride: See `key_rows`.
        SINKS: See `write_frame`.
        DIM: See `write_frame`.
        DIM_PADDED: See `write_frame`.
        N: See `write_frame`.

    """
    index, head = tl.program_id(0), tl.program_id(1)
    piece = pieces + index * NUM_COLUMNS
    count = tl.load(piece + COUNT)
    if (count == 0) | (tl.load(piece + START) + count < SINKS):
        return
    write_frame(
        frames + (index * num_heads + head) * (FRAME_VECTORS * DIM),
        k_cache,
        k_scale,
        block_table + tl.load(piece + REQUEST).to(tl.int64) * table_stride,
        head,
        block_stride,
        head_stride,
        slot_stride,
        SINKS,
        DIM,
        DIM_PADDED,
        N,
    )
