"""Moves the survivors of a reduced segment out of the scratch slots (design 1.3)."""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels.triton.pieces import (
    BUDGET,
    COMPACT,
    COUNT,
    NUM_COLUMNS,
    SLOT,
)
from hashevict_vllm.kernels.triton.slots import head_of, key_rows, meta_of, value_rows


@triton.jit
def _list_slots(
    at,
    listed,
    begin,
    end,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    TILE: tl.constexpr,
    MARKED: tl.constexpr,
):
    """List the slots of [begin, end) that are marked (or are not), ascending.

    Args:
        at: `Head`.
        listed: int32 pointer; every other element from here on is written.
        begin: First slot.
        end: Slot after the last.
        rule: `DeviceRule`.
        sizes: `Sizes`.
        TILE: Slots per step.
        MARKED: Which slots.

    Returns:
        int32, how many they are.

    """
    lane = tl.arange(0, TILE)
    found = 0
    for first in range(begin, end, TILE):
        slots = first + lane
        used = slots < end
        meta = meta_of(at, slots, used, sizes)
        position = tl.load(meta + rule.words * at.page.word, mask=used, other=0)
        if MARKED:
            wanted = used & (position < 0)
        else:
            wanted = used & (position >= 0)
        one = wanted.to(tl.int32)
        rank = found + tl.cumsum(one, 0) - 1
        tl.store(listed + 2 * rank, slots, mask=wanted)
        found += tl.sum(one, 0)
    return found


@triton.jit
def pair_kernel(
    step,
    page,
    moves,
    num_moves,
    width,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: which survivor of one piece and KV head goes into which hole.

    Both in order of their slots. As many slots below the budget are marked as survive
    beyond it, since all but C are marked.

    Args:
        step: `Step`; pieces that are not compacted move nothing.
        page: `Page`.
        moves: int32 [P, Hkv, width, 2], written: hole and survivor.
        num_moves: int32 [P, Hkv], written.
        width: Room for moves per piece and KV head.
        rule: `DeviceRule`.
        sizes: `Sizes`.
        TILE: Slots per step.

    """
    index, head = tl.program_id(0), tl.program_id(1)
    piece = step.pieces + index * NUM_COLUMNS
    row = (index * step.heads + head).to(tl.int64)
    if tl.load(piece + COMPACT) == 0:
        tl.store(num_moves + row, 0)
        return
    at = head_of(step, page, piece, head)
    end = tl.load(piece + SLOT) + tl.load(piece + COUNT)
    holes, budget = moves + row * width * 2, tl.load(piece + BUDGET)
    found = _list_slots(at, holes, 0, budget, rule, sizes, TILE, True)
    tl.store(num_moves + row, found)
    _list_slots(at, holes + 1, budget, end, rule, sizes, TILE, False)


@triton.jit
def _move_rows(
    cache,
    source,
    target,
    used,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    """Copy rows of D raw elements of K or V, several slots at once."""
    d = tl.arange(0, DIM_PADDED)
    mask = used[:, None] & (d < DIM)[None, :]
    x = tl.load(cache + source[:, None] + d[None, :], mask=mask)
    tl.store(cache + target[:, None] + d[None, :], x, mask=mask)


@triton.jit
def move_kernel(
    step,
    page,
    moves,
    num_moves,
    width,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: up to ``ROWS`` moves of one piece and KV head.

    Sources lie beyond the budget and targets below it, so moves do not meet.

    Args:
        step: `Step`.
        page: `Page`, K and V as integers of the element's size.
        moves: int32 [P, Hkv, width, 2], from `pair_kernel`.
        num_moves: int32 [P, Hkv], likewise.
        width: Room for moves per piece and KV head.
        rule: `DeviceRule`.
        sizes: `Sizes`.
        ROWS: Moves of a program.

    """
    index, head = tl.program_id(0), tl.program_id(1)
    row = (index * step.heads + head).to(tl.int64)
    first = tl.program_id(2) * ROWS
    count = tl.load(num_moves + row)
    if first >= count:
        return
    at = head_of(step, page, step.pieces + index * NUM_COLUMNS, head)
    rank = first + tl.arange(0, ROWS)
    used = rank < count
    move = moves + (row * width + rank) * 2
    hole = tl.load(move, mask=used, other=0)
    survivor = tl.load(move + 1, mask=used, other=0)
    source = key_rows(page, at.table, head, survivor, used, sizes)
    target = key_rows(page, at.table, head, hole, used, sizes)
    _move_rows(page.k, source, target, used, sizes.dim, sizes.dim_padded)
    source = value_rows(page, at.table, head, survivor, used, sizes)
    target = value_rows(page, at.table, head, hole, used, sizes)
    _move_rows(page.v, source, target, used, sizes.dim, sizes.dim_padded)
    source = meta_of(at, survivor, used, sizes)
    target = meta_of(at, hole, used, sizes)
    for w in tl.static_range(rule.words + 1):
        word = tl.load(source + w * page.word, mask=used, other=0)
        tl.store(target + w * page.word, word, mask=used)
