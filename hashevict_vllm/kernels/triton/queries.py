"""What of a query meets the words of slots (`hashevict_vllm.policies.vote`)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _queries(
    q, q_head_stride, member, dims, scale, DIM: tl.constexpr, GROUP: tl.constexpr
):
    """Elements float32 [G', n] of a group's queries, times ``scale``."""
    x = tl.load(
        q + member[:, None] * q_head_stride + dims[None, :],
        mask=(member < GROUP)[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )
    return x.to(tl.float32) * scale


@triton.jit
def _axes(frame, dims, DIM: tl.constexpr):
    """Elements float32 [1, n] of both axes."""
    one = tl.load(frame + DIM + dims, mask=dims < DIM, other=0.0)
    two = tl.load(frame + 2 * DIM + dims, mask=dims < DIM, other=0.0)
    return one.to(tl.float32)[None, :], two.to(tl.float32)[None, :]


@triton.jit
def project_queries(
    q,
    q_head_stride,
    frame,
    projection,
    projected,
    scale,
    factor,
    length,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Write what of a group's queries meets slots: ``projected`` float32 [b + 2, G'].

    Of queries times ``scale``: ``factor rest . r_j``, then their coordinates along the
    axes of the frame (`KeyFrame.split`). In float32 throughout, as signatures are. Ends
    with a barrier.
    """
    member, step = tl.arange(0, MEMBERS), tl.arange(0, STEP)
    d = tl.arange(0, DIM_PADDED)
    x = _queries(q, q_head_stride, member, d, scale, DIM, GROUP)
    one, two = _axes(frame, d, DIM)
    along = projected + BITS * MEMBERS + member
    tl.store(along, tl.sum(x * one, 1))
    tl.store(along + MEMBERS, tl.sum(x * two, 1))
    tl.debug_barrier()
    for w in tl.static_range((BITS + 31) // 32):
        column = w * 32 + tl.arange(0, 32)
        dots = tl.zeros([MEMBERS, 32], tl.float32)
        # Without stages, which take registers.
        for first in tl.range(0, length, STEP, num_stages=1):
            dims = first + step
            rest = _queries(q, q_head_stride, member, dims, scale, DIM, GROUP)
            first_axis, second_axis = _axes(frame, dims, DIM)
            rest -= tl.load(along)[:, None] * first_axis
            rest -= tl.load(along + MEMBERS)[:, None] * second_axis
            r = tl.load(
                projection + dims[:, None] * BITS + column[None, :],
                mask=(dims < DIM)[:, None] & (column < BITS)[None, :],
                other=0.0,
            )
            dots = tl.dot(rest, r, dots, input_precision="ieee")
        tl.store(
            projected + column[None, :] * MEMBERS + member[:, None],
            dots * factor,
            mask=(column < BITS)[None, :] & (member >= 0)[:, None],
        )
    tl.debug_barrier()
