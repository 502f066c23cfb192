"""What reduces a segment; `ops` is where it is imported from."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.codes import AHEAD, SMOOTH
from hashevict_vllm.kernels.triton import launch, segment
from hashevict_vllm.kernels.triton.arguments import (
    Asked,
    Estimate,
    Page,
    Signed,
    Sizes,
    Step,
    Tokens,
    Unlike,
)
from hashevict_vllm.kernels.triton.compact import move_kernel, pair_kernel
from hashevict_vllm.kernels.triton.frame import FRAME_VECTORS, frame_kernel
from hashevict_vllm.kernels.triton.mark import replay_kernel, select_kernel
from hashevict_vllm.kernels.triton.pool import pool_kernel
from hashevict_vllm.kernels.triton.rule import DeviceRule
from hashevict_vllm.kernels.triton.value import apart_kernel, values_kernel

_REPLAYED = (codes.HAMMING_TO_KEY, codes.HAMMING_TO_QUERY, codes.RANDOM)
"""Rules whose choice depends on the token that asks."""


def frames(rule: DeviceRule, step: Step, page: Page, sizes: Sizes) -> Tensor:
    """The frames of a round's pieces: float64 [P, Hkv, 3, D]."""
    num_pieces, num_heads = step.pieces.shape[0], step.heads
    shape = (num_pieces, num_heads, FRAME_VECTORS.value, sizes.dim)
    made = torch.empty(shape, dtype=torch.float64, device=step.pieces.device)
    if rule.sinks or rule.window:
        frame_kernel[(num_pieces, num_heads)](
            made, step, page, rule=rule, sizes=sizes, **launch.FRAME_OPTIONS
        )
    return made


def mark(
    tokens: Tokens,
    signed: Signed,
    step: Step,
    page: Page,
    estimate: Estimate,
    rule: DeviceRule,
    bound: int,
    longest: int,
) -> None:
    """Mark the losers of every piece.

    Args:
        tokens: As `ops.write`.
        signed: As `ops.write`.
        step: Of the pieces that overflow the budget, or whose segment is voted on.
        page: As `ops.write`.
        estimate: As `ops.ballot`.
        rule: What kernels are compiled for.
        bound: Most slots of any request of the batch, which the host knows.
        longest: Positions, at least of every token of these requests.

    """
    num_pieces = step.pieces.shape[0]
    if num_pieces == 0:
        return
    grid = (num_pieces, step.heads)
    sizes = Sizes.of(rule, page, tokens.q.shape[1] // step.heads)
    options = {"rule": rule, "sizes": sizes, **launch.SCAN_OPTIONS}
    if rule.kind in _REPLAYED:
        tile = launch.scan_tile(bound)
        replay_kernel[grid](signed, step, page, **options, TILE=tile)
        return
    merit = None
    if rule.votes:
        _vote(tokens, step, page, estimate, rule, sizes, bound)
        merit = merit_of(step, page, estimate.credit, rule, sizes, bound, longest)
    tile = launch.scan_tile(bound)
    select_kernel[grid](step, page, merit, bound, **options, TILE=tile)


def _vote(
    tokens: Tokens,
    step: Step,
    page: Page,
    estimate: Estimate,
    rule: DeviceRule,
    sizes: Sizes,
    bound: int,
) -> None:
    """Votes of a segment's last queries, see `segment`."""
    num_pieces, heads, window = step.pieces.shape[0], step.heads, rule.window
    tiles = triton.cdiv(bound, launch.SEGMENT_TILE)
    queries = (num_pieces, heads, window)

    def empty(*shape: int) -> Tensor:
        return torch.empty(
            (*queries, *shape), dtype=torch.float32, device=page.tail.device
        )

    asked = Asked(
        projected=empty(rule.bits + 2, sizes.members),
        tops=empty(sizes.members, tiles),
        sums=empty(sizes.members, tiles),
        totals=empty(sizes.members, 2),
    )
    common = {"rule": rule, "sizes": sizes}
    tiled = {
        **common,
        "ROWS": max(launch.SEGMENT_ROWS, sizes.members),
        "TILE": launch.SEGMENT_TILE,
        **launch.SEGMENT_OPTIONS,
    }
    segment.ask_kernel[(window, num_pieces, heads)](
        tokens,
        step,
        estimate,
        asked,
        frames(rule, step, page, sizes),
        **common,
        STEP=launch.SIGN_STEP,
        num_warps=4,
    )
    segment.tops_kernel[(tiles, num_pieces, heads)](step, page, asked, tiles, **tiled)
    segment.totals_kernel[(window * sizes.members, num_pieces, heads)](
        step,
        asked,
        tiles,
        **common,
        SLOTS=launch.SEGMENT_TILE,
        TILE=launch.TOTALS_TILE,
        num_warps=1,
    )
    segment.add_kernel[(tiles, num_pieces, heads)](step, page, asked, **tiled)


def merit_of(
    step: Step,
    page: Page,
    credit: float,
    rule: DeviceRule,
    sizes: Sizes,
    bound: int,
    longest: int,
) -> Tensor:
    """What slots are worth, as it decides who stays: float32 [P, Hkv, bound].

    ``credit`` is `Estimate.credit`.
    """
    heads = (step.pieces.shape[0], step.heads)
    float32 = {"dtype": torch.float32, "device": page.tail.device}
    # By position; whole units of 16 bytes, so that all are aligned alike.
    longest = triton.cdiv(longest, 4) * 4
    shape = (3 if credit else 2, *heads, longest)
    spread, smooth, *apart = torch.zeros(shape, **float32)
    merit = torch.empty((*heads, bound), **float32)
    tiles = triton.cdiv(bound, launch.POOL_TILE)
    unlike = Unlike(None, None, None, None, credit)
    if credit:
        unlike = Unlike(
            sums=torch.empty((*heads, launch.VALUE_SLICES, sizes.dim), **float32),
            apart=apart[0],
            beside=torch.empty_like(merit),
            totals=torch.empty((*heads, tiles), **float32),
            weight=credit,
        )
        _measure_values(step, page, unlike, rule, sizes, bound, longest)
    # Which neighbours count (policies/vote.py); without pooling a slot is its own.
    near = SMOOTH if rule.pool > 1 else 0
    reach = (rule.pool - AHEAD - 1, AHEAD) if rule.pool > 1 else (0, 0)
    for read, written, stage, before, ahead in (
        (spread, spread, 0, 0, 0),
        (spread, smooth, 1, near, near),
        (smooth, merit, 2, *reach),
    ):
        pool_kernel[(*heads, tiles)](
            step,
            page,
            read,
            written,
            longest,
            bound,
            unlike,
            rule=rule,
            sizes=sizes,
            STAGE=stage,
            BEFORE=before,
            AHEAD=ahead,
            TILE=launch.POOL_TILE,
            num_warps=4,
        )
    return merit


def _measure_values(
    step: Step,
    page: Page,
    unlike: Unlike,
    rule: DeviceRule,
    sizes: Sizes,
    bound: int,
    longest: int,
) -> None:
    """How far values are from their mean, by position."""
    num_pieces, heads = step.pieces.shape[0], step.heads
    tile = launch.value_tile(sizes.dim)
    tiles = triton.cdiv(bound, tile)
    options = {
        "rule": rule,
        "sizes": sizes,
        "SLICES": launch.VALUE_SLICES,
        "TILE": tile,
        **launch.VALUE_OPTIONS,
    }
    slices = min(launch.VALUE_SLICES, tiles)
    values_kernel[(slices, num_pieces, heads)](step, page, unlike, **options)
    apart_kernel[(tiles, num_pieces, heads)](step, page, unlike, longest, **options)


def compact(step: Step, page: Page, rule: DeviceRule, bound: int) -> None:
    """Move the survivors of complete segments into the marked slots.

    Args:
        step: Pieces that are not compacted are left alone.
        page: As `ops.write`.
        rule: What kernels are compiled for.
        bound: Most slots of any request of the batch, which the host knows.

    """
    num_pieces, num_heads = step.pieces.shape[0], step.heads
    # Moves of a piece: at most C holes, and as many survivors behind them, be C the
    # server's or less.
    width = min(rule.budget, rule.segment, bound // 2) if rule.segment > 1 else 0
    if num_pieces == 0 or width == 0:
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
