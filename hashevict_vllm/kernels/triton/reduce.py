"""What reduces a segment; `ops` is where it is imported from."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hashevict_vllm.kernels.triton import launch
from hashevict_vllm.kernels.triton.arguments import (
    Estimate,
    Page,
    Signed,
    Sizes,
    Step,
    Tokens,
)
from hashevict_vllm.kernels.triton.compact import move_kernel, pair_kernel
from hashevict_vllm.kernels.triton.frame import FRAME_VECTORS
from hashevict_vllm.kernels.triton.mark import (
    pool_kernel,
    replay_kernel,
    select_kernel,
)
from hashevict_vllm.kernels.triton.rule import DeviceRule
from hashevict_vllm.kernels.triton.votes import vote_kernel
from hashevict_vllm.policies.vote import AHEAD, SMOOTH


def projections(rule: DeviceRule, step: Step, members: int) -> Tensor:
    """Scratch for split queries, where a rule votes: float32 [P, Hkv, b + 2, G']."""
    num_pieces = step.pieces.shape[0] if rule.votes else 0
    shape = (num_pieces, step.heads, rule.bits + 2, members)
    return torch.empty(shape, dtype=torch.float32, device=step.pieces.device)


def frames(rule: DeviceRule, step: Step, page: Page) -> Tensor:
    """Scratch for frames, where a rule votes: float64 [P, Hkv, 3, D]."""
    num_pieces = step.pieces.shape[0] if rule.votes else 0
    shape = (num_pieces, step.heads, FRAME_VECTORS.value, page.k.shape[3])
    return torch.empty(shape, dtype=torch.float64, device=step.pieces.device)


def mark(
    tokens: Tokens,
    signed: Signed,
    step: Step,
    page: Page,
    estimate: Estimate,
    rule: DeviceRule,
    bound: int,
) -> None:
    """Mark the losers of every piece, by replay or by votes.

    Args:
        tokens: As `ops.write`.
        signed: As `ops.write`.
        step: Of the pieces that overflow the budget or vote.
        page: As `ops.write`.
        estimate: As `ops.write`.
        rule: What kernels are compiled for.
        bound: See `ops`.

    """
    num_pieces = step.pieces.shape[0]
    if num_pieces == 0:
        return
    grid = (num_pieces, step.heads)
    sizes = Sizes.of(rule, page, tokens.q.shape[1] // step.heads)
    scan = {"TILE": launch.scan_tile(bound), **launch.SCAN_OPTIONS}
    if not rule.votes:
        replay_kernel[grid](signed, step, page, rule=rule, sizes=sizes, **scan)
        return
    vote_kernel[grid](
        tokens,
        step,
        page,
        estimate,
        projections(rule, step, sizes.members),
        frames(rule, step, page),
        rule=rule,
        sizes=sizes,
        STEP=launch.SIGN_STEP,
        TILE=launch.vote_tile(sizes.group, bound),
        **launch.SCAN_OPTIONS,
    )
    shape = (*grid, bound)
    pooled, smooth = (
        torch.empty(shape, dtype=torch.float32, device=page.tail.device)
        for _ in range(2)
    )
    # Which neighbours count (policies/vote.py); without pooling a slot is its own.
    reach = (0, 0) if rule.pool == 1 else (SMOOTH, SMOOTH)
    stages = [(smooth if rule.pool > 1 else pooled, *reach, True)]
    if rule.pool > 1:
        stages.append((pooled, rule.pool - AHEAD - 1, AHEAD, False))
    for target, before, ahead, smooths in stages:
        pool_kernel[(*grid, triton.cdiv(bound, launch.POOL_TILE))](
            step,
            page,
            smooth,
            target,
            bound,
            rule=rule,
            sizes=sizes,
            BEFORE=before,
            AHEAD=ahead,
            SMOOTHS=smooths,
            TILE=launch.POOL_TILE,
            NEIGHBOURS=launch.POOL_NEIGHBOURS,
            num_warps=4,
        )
    select_kernel[grid](step, page, pooled, bound, rule=rule, sizes=sizes, **scan)


def compact(step: Step, page: Page, rule: DeviceRule, bound: int) -> None:
    """Move the survivors of complete segments into the marked slots.

    Args:
        step: Pieces that are not compacted are left alone.
        page: As `ops.write`.
        rule: What kernels are compiled for.
        bound: See `ops`.

    """
    num_pieces, num_heads = step.pieces.shape[0], step.heads
    width = min(rule.budget, bound - rule.budget)
    if num_pieces == 0 or width <= 0:
        return
    shape, device = (num_pieces, num_heads, width, 2), page.tail.device
    moves = torch.empty(shape, dtype=torch.int32, device=device)
    num_moves = torch.empty(shape[:2], dtype=torch.int32, device=device)
    common = {"rule": rule, "sizes": Sizes.of(rule, page, 1)}
    pair_kernel[(num_pieces, num_heads)](
        step,
        page,
        moves,
        num_moves,
        width,
        **common,
        TILE=launch.scan_tile(bound),
        **launch.SCAN_OPTIONS,
    )
    rows = launch.move_rows(page.k.shape[3])
    raw = page._replace(k=launch.as_integers(page.k), v=launch.as_integers(page.v))
    move_kernel[(num_pieces, num_heads, triton.cdiv(width, rows))](
        step, raw, moves, num_moves, width, **common, ROWS=rows, num_warps=4
    )
