"""What of a query meets the words of slots (`hashevict_vllm.policies.vote`)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _queries(q, q_head, member, dims, scale, sizes: tl.constexpr):
    """Elements float32 [G', n] of a group's queries, times ``scale``."""
    x = tl.load(
        q + member[:, None] * q_head + dims[None, :],
        mask=(member < sizes.group)[:, None] & (dims < sizes.dim)[None, :],
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
    q_head,
    frame,
    projected,
    estimate,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    STEP: tl.constexpr,
):
    """Write what of a group's queries meets slots: ``projected`` float32 [b + 2, G'].

    Of queries times the softmax scale: ``factor rest . r_j``, then their coordinates
    along the axes of the frame (`KeyFrame.split`). In float32 throughout, as signatures
    are. Ends with a barrier.

    Args:
        q: Pointer to the token's first query of the group.
        q_head: Elements between heads of q.
        frame: float64 pointer [3, D], from `write_frame`.
        projected: float32 pointer [b + 2, G'], written.
        estimate: `Estimate`.
        rule: `DeviceRule`.
        sizes: `Sizes`.
        STEP: Elements of D per step of the projection.

    """
    members: tl.constexpr = sizes.members
    padded: tl.constexpr = sizes.dim_padded
    member, lane = tl.arange(0, members), tl.arange(0, STEP)
    d = tl.arange(0, padded)
    x = _queries(q, q_head, member, d, estimate.scale, sizes)
    one, two = _axes(frame, d, sizes.dim)
    along = projected + rule.bits * members + member
    tl.store(along, tl.sum(x * one, 1))
    tl.store(along + members, tl.sum(x * two, 1))
    tl.debug_barrier()
    hashed: tl.constexpr = sizes.hashed
    for w in tl.static_range(hashed):
        column = w * 32 + tl.arange(0, 32)
        dots = tl.zeros([members, 32], tl.float32)
        # Without stages, which take registers.
        for first in tl.range(0, estimate.length, STEP, num_stages=1):
            dims = first + lane
            rest = _queries(q, q_head, member, dims, estimate.scale, sizes)
            first_axis, second_axis = _axes(frame, dims, sizes.dim)
            rest -= tl.load(along)[:, None] * first_axis
            rest -= tl.load(along + members)[:, None] * second_axis
            r = tl.load(
                estimate.projection + dims[:, None] * rule.bits + column[None, :],
                mask=(dims < sizes.dim)[:, None] & (column < rule.bits)[None, :],
                other=0.0,
            )
            dots = tl.dot(rest, r, dots, input_precision="ieee")
        tl.store(
            projected + column[None, :] * members + member[:, None],
            dots * estimate.factor,
            mask=(column < rule.bits)[None, :] & (member >= 0)[:, None],
        )
    tl.debug_barrier()
