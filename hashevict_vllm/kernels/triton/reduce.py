"""The operators that reduce a segment; `ops` is where they are imported from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from hashevict_vllm.kernels.codes import AHEAD, SMOOTH
from hashevict_vllm.kernels.triton import launch
from hashevict_vllm.kernels.triton.compact import move_kernel, pair_kernel
from hashevict_vllm.kernels.triton.frame import FRAME_VECTORS
from hashevict_vllm.kernels.triton.mark import (
    pool_kernel,
    replay_kernel,
    select_kernel,
)
from hashevict_vllm.kernels.triton.rule import DeviceRule
from hashevict_vllm.kernels.triton.votes import vote_kernel


def projections(
    rule: DeviceRule, pieces: Tensor, num_heads: int, members: int
) -> Tensor:
    """Scratch for split queries, where a rule votes: float32 [P, Hkv, b + 2, G']."""
    shape = (pieces.shape[0] if rule.votes else 0, num_heads, rule.bits + 2, members)
    return torch.empty(shape, dtype=torch.float32, device=pieces.device)


def frames(rule: DeviceRule, pieces: Tensor, k_cache: Tensor) -> Tensor:
    """Scratch for frames, where a rule votes: float64 [P, Hkv, 3, D]."""
    num_pieces = pieces.shape[0] if rule.votes else 0
    shape = (num_pieces, k_cache.shape[1], FRAME_VECTORS.value, k_cache.shape[3])
    return torch.empty(shape, dtype=torch.float64, device=pieces.device)


@torch.library.custom_op("hashevict::mark", mutates_args=("tail",))
def mark(
    q: Tensor,
    signatures: Tensor,
    pieces: Tensor,
    block_table: Tensor,
    k_cache: Tensor,
    k_scale: Tensor | None,
    tail: Tensor,
    projection: Tensor,
    scale: float,
    factor: float,
    decay: float,
    rule: Sequence[int],
    bound: int,
) -> None:
    """Mark the losers of every piece, by replay or by votes.

    Args:
        q: As `ops.write`.
        signatures: As `ops.write`.
        pieces: int32 [P, columns], the pieces that overflow the budget or vote.
        block_table: As `ops.write`.
        k_cache: As `ops.write`.
        k_scale: As `ops.write`.
        tail: As `ops.write`.
        projection: As `ops.write`.
        scale: As `ops.write`.
        factor: As `ops.write`.
        decay: As `ops.write`.
        rule: See `ops`.
        bound: See `ops`.

    """
    r = DeviceRule(*rule)
    num_pieces, num_heads = pieces.shape[0], tail.shape[1]
    group = q.shape[1] // num_heads
    launch.check_rows(q=q, k_cache=k_cache, tail=tail)
    if num_pieces == 0:
        return
    grid = (num_pieces, num_heads)
    strides = (block_table.stride(0), *tail.stride()[:3])
    tile = launch.scan_tile(bound)
    if not r.votes:
        replay_kernel[grid](
            signatures,
            pieces,
            block_table,
            tail,
            num_heads,
            *strides,
            KIND=r.kind,
            WORDS=r.words,
            GROUP=group,
            SALT=r.salt,
            SINKS=r.sinks,
            RECENT=r.recent,
            BUDGET=r.budget,
            HASHED=r.hashed,
            N=tail.shape[3],
            TILE=tile,
            **launch.SCAN_OPTIONS,
        )
        return
    members = launch.padded(group)
    vote_kernel[grid](
        q,
        projection,
        projections(r, pieces, num_heads, members),
        frames(r, pieces, k_cache),
        pieces,
        block_table,
        k_cache,
        k_scale,
        tail,
        scale,
        factor,
        r.bits,
        q.shape[2],
        decay,
        num_heads,
        *q.stride()[:2],
        block_table.stride(0),
        *k_cache.stride()[:3],
        *tail.stride()[:3],
        WORDS=r.words,
        DIM=q.shape[2],
        DIM_PADDED=launch.padded(q.shape[2]),
        BITS=r.bits,
        GROUP=group,
        MEMBERS=members,
        EVERY=r.every,
        SINKS=r.sinks,
        STEP=launch.SIGN_STEP,
        N=tail.shape[3],
        TILE=launch.vote_tile(group, bound),
        **launch.SCAN_OPTIONS,
    )
    shape = (num_pieces, num_heads, bound)
    pooled, smooth = (
        torch.empty(shape, dtype=torch.float32, device=tail.device) for _ in range(2)
    )
    # Which neighbours count (policies/vote.py); without pooling a slot is its own.
    reach = (0, 0) if r.pool == 1 else (SMOOTH, SMOOTH)
    stages = [(smooth if r.pool > 1 else pooled, *reach, True)]
    if r.pool > 1:
        stages.append((pooled, r.pool - AHEAD - 1, AHEAD, False))
    for target, before, ahead, smooths in stages:
        pool_kernel[(*grid, triton.cdiv(bound, launch.POOL_TILE))](
            pieces,
            block_table,
            tail,
            smooth,
            target,
            num_heads,
            bound,
            *strides,
            WORDS=r.words,
            BEFORE=before,
            AHEAD=ahead,
            SMOOTHS=smooths,
            N=tail.shape[3],
            TILE=launch.POOL_TILE,
            NEIGHBOURS=launch.POOL_NEIGHBOURS,
            num_warps=4,
        )
    select_kernel[grid](
        pieces,
        block_table,
        tail,
        pooled,
        num_heads,
        bound,
        *strides,
        WORDS=r.words,
        SINKS=r.sinks,
        RECENT=r.recent,
        BUDGET=r.budget,
        N=tail.shape[3],
        TILE=tile,
        **launch.SCAN_OPTIONS,
    )


@torch.library.custom_op(
    "hashevict::compact", mutates_args=("k_cache", "v_cache", "tail")
)
def compact(
    pieces: Tensor,
    block_table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tail: Tensor,
    rule: Sequence[int],
    bound: int,
) -> None:
    """Move the survivors of complete segments into the marked slots.

    Args:
        pieces: int32 [P, columns]; those that are not compacted are left alone.
        block_table: As `ops.write`.
        k_cache: As `ops.write`.
        v_cache: As `ops.write`.
        tail: As `ops.write`.
        rule: See `ops`.
        bound: See `ops`.

    """
    r = DeviceRule(*rule)
    num_pieces, num_heads = pieces.shape[0], tail.shape[1]
    launch.check_rows(k_cache=k_cache, v_cache=v_cache, tail=tail)
    width = min(r.budget, bound - r.budget)
    if num_pieces == 0 or width <= 0:
        return
    head_dim, device = k_cache.shape[3], tail.device
    moves = torch.empty(
        (num_pieces, num_heads, width, 2), dtype=torch.int32, device=device
    )
    num_moves = torch.empty((num_pieces, num_heads), dtype=torch.int32, device=device)
    pair_kernel[(num_pieces, num_heads)](
        pieces,
        block_table,
        tail,
        moves,
        num_moves,
        num_heads,
        width,
        block_table.stride(0),
        *tail.stride()[:3],
        WORDS=r.words,
        BUDGET=r.budget,
        N=tail.shape[3],
        TILE=launch.scan_tile(bound),
        **launch.SCAN_OPTIONS,
    )
    rows = launch.move_rows(head_dim)
    move_kernel[(num_pieces, num_heads, triton.cdiv(width, rows))](
        pieces,
        block_table,
        launch.as_integers(k_cache),
        launch.as_integers(v_cache),
        tail,
        moves,
        num_moves,
        num_heads,
        width,
        block_table.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *tail.stride()[:3],
        WORDS=r.words,
        DIM=head_dim,
        DIM_PADDED=launch.padded(head_dim),
        N=tail.shape[3],
        ROWS=rows,
        num_warps=4,
    )


@mark.register_fake
@compact.register_fake
def _in_place(*_: object) -> None:
    """Operators write into their arguments and return nothing."""
