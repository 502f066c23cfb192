"""Credit for unusual values, when a segment is reduced.

See `hashevict_vllm.policies.value` for the rule. Values are added up first, slice by
slice of the slots; then comes how far each is from their mean, spread out by position.
Neighbours are averaged, and credit is given, where votes are pooled
(`hashevict_vllm.kernels.triton.pool`). Every sum has an order that follows from a
request's slots alone, and work is linear in them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels.codes import BEFORE_THE_END, BESIDE, PROMPT_GOES_ON
from hashevict_vllm.kernels.triton.pieces import (
    BUDGET,
    COMPACT,
    COUNT,
    NUM_COLUMNS,
    SLOT,
)
from hashevict_vllm.kernels.triton.slots import (
    head_of,
    load_elements,
    meta_of,
    value_rows,
)

_BEFORE_THE_END = tl.constexpr(BEFORE_THE_END)
_BESIDE = tl.constexpr(BESIDE)
_PROMPT_GOES_ON = tl.constexpr(PROMPT_GOES_ON)
_AT_ONCE = tl.constexpr(128)


@triton.jit
def _load_values(at, slots, used, sizes: tl.constexpr):
    """Values float32 [n, D'] of slots, 0 where not used and beyond D."""
    d = tl.arange(0, sizes.dim_padded)
    rows = value_rows(at.page, at.table, at.index, slots, used, sizes)
    inside = used[:, None] & (d < sizes.dim)[None, :]
    page = at.page
    return load_elements(page.v, page.v_scale, rows[:, None] + d[None, :], inside)


@triton.jit
def values_kernel(
    step,
    page,
    unlike,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    SLICES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: the values of one slice of one piece and KV head are added up.

    Args:
        step: `Step`; pieces that are not compacted are left out.
        page: `Page`.
        unlike: `Unlike`; ``sums`` are written, of slices that are not empty.
        rule: `DeviceRule`; slots of sinks, the first, are left out.
        sizes: `Sizes`.
        SLICES: A slice is one tile of slots in so many.
        TILE: Slots at a time.

    """
    part, index, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    piece = step.pieces + index * NUM_COLUMNS
    end = tl.load(piece + SLOT) + tl.load(piece + COUNT)
    if (tl.load(piece + COMPACT) == 0) | (part * TILE >= end):
        return
    at = head_of(step, page, piece, head)
    lane, d = tl.arange(0, TILE), tl.arange(0, sizes.dim_padded)
    total = tl.zeros([TILE, sizes.dim_padded], tl.float32)
    for first in range(part * TILE, end, SLICES * TILE):
        slots = first + lane
        counted = (slots < end) & (slots >= rule.sinks)
        total += _load_values(at, slots, counted, sizes)
    owner = (index * step.heads + head).to(tl.int64)
    row = unlike.sums + (owner * SLICES + part) * sizes.dim
    tl.store(row + d, tl.sum(total, 0), mask=d < sizes.dim)


@triton.jit(do_not_specialize=["longest"])
def apart_kernel(
    step,
    page,
    unlike,
    longest,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    SLICES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: squared distances from the mean of one tile of values.

    Args:
        step: `Step`; pieces that are not compacted are left out.
        page: `Page`.
        unlike: `Unlike`; ``apart`` is written.
        longest: Positions, at least of every slot.
        rule: `DeviceRule`.
        sizes: `Sizes`.
        SLICES: As `values_kernel`.
        TILE: Likewise; slots of a program.

    """
    first, index, head = tl.program_id(0) * TILE, tl.program_id(1), tl.program_id(2)
    piece = step.pieces + index * NUM_COLUMNS
    end = tl.load(piece + SLOT) + tl.load(piece + COUNT)
    if (tl.load(piece + COMPACT) == 0) | (first >= end):
        return
    at = head_of(step, page, piece, head)
    owner = (index * step.heads + head).to(tl.int64)
    part, d = tl.arange(0, SLICES), tl.arange(0, sizes.dim_padded)
    sums = tl.load(
        unlike.sums + ((owner * SLICES + part) * sizes.dim)[:, None] + d[None, :],
        mask=(part * TILE < end)[:, None] & (d < sizes.dim)[None, :],
        other=0.0,
    )
    mean = tl.sum(sums, 0) / (end - rule.sinks)
    slots = first + tl.arange(0, TILE)
    used = slots < end
    x = _load_values(at, slots, used, sizes) - mean[None, :]
    square = tl.sum(x * x, 1)
    square = tl.where(square < float("inf"), square, 0.0)
    meta = meta_of(at, slots, used, sizes)
    position = tl.load(meta + rule.words * page.word, mask=used, other=0)
    tl.store(unlike.apart + owner * longest + position, square, mask=used)


@triton.jit
def average_beside(
    unlike, owner, longest, width, position, slots, used, rule: tl.constexpr
):
    """Average distances of neighbours, and add up those of the program's slots.

    Args:
        unlike: `Unlike`; ``beside`` and ``totals`` are written.
        owner: Number of the piece and KV head, int64.
        longest: See `apart_kernel`.
        width: Slots per row of ``beside``.
        position: int32 [n].
        slots: int32 [n], of the program; programs of a head are the grid's last axis.
        used: bool [n].
        rule: `DeviceRule`.

    """
    total = tl.zeros(position.shape, tl.float32)
    count = tl.zeros(position.shape, tl.float32)
    for i in tl.static_range(2 * _BESIDE + 1):
        near = position + (i - _BESIDE)
        there = used & (near >= 0) & (near < longest)
        apart = tl.load(unlike.apart + owner * longest + near, mask=there, other=0.0)
        total += apart
        count += (apart > 0).to(tl.float32)
    beside = total / tl.maximum(count, 1.0)
    tl.store(unlike.beside + owner * width + slots, beside, mask=used)
    counted = used & (slots >= rule.sinks)
    written = owner * tl.num_programs(2) + tl.program_id(2)
    tl.store(unlike.totals + written, tl.sum(tl.where(counted, beside, 0.0), 0))


@triton.jit
def credit_of(unlike, owner, width, piece, end, slots, used, rule: tl.constexpr):
    """Credit float32 [n] of slots; 0 where it is not finite.

    Args:
        unlike: `Unlike`.
        owner: As `average_beside`.
        width: Likewise.
        piece: int32 pointer to the row of the piece.
        end: Slots of the request.
        slots: int32 [n], as many as a program of `average_beside` has.
        used: bool [n].
        rule: `DeviceRule`.

    """
    tile: tl.constexpr = slots.shape[0]
    lane = tl.arange(0, _AT_ONCE)
    row = unlike.totals + owner * tl.num_programs(2)
    totals = tl.zeros([_AT_ONCE], tl.float32)
    for first in range(0, tl.cdiv(end, tile), _AT_ONCE):
        totals += tl.load(
            row + first + lane, mask=(first + lane) * tile < end, other=0.0
        )
    mean = tl.sum(totals, 0) / (end - rule.sinks)
    mean = tl.where(mean > 0, mean, float("inf"))  # else all values are alike
    kept = tl.load(piece + BUDGET).to(tl.float32) / end.to(tl.float32)
    weight = unlike.weight * kept * (1.0 - kept) * (1.0 - kept) / end.to(tl.float32)
    goes_on = tl.load(piece + COMPACT) == _PROMPT_GOES_ON
    weight = tl.where(goes_on, weight * _BEFORE_THE_END, weight)
    beside = tl.load(unlike.beside + owner * width + slots, mask=used, other=0.0)
    ratio = beside / mean
    credit = weight * (ratio * ratio)
    return tl.where(credit < float("inf"), credit, 0.0)
