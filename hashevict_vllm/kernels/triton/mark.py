"""Marks the losers of a segment ``~position`` (design 1.3), before it is compacted.

Rules of one step replay the decode rule token by token (`replay_kernel`). Rules that
vote pool the votes of neighbours (`pool_kernel`) and select once (`select_kernel`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels.triton.pieces import (
    COMPACT,
    COUNT,
    EVICT,
    NUM_COLUMNS,
    ROW,
    SLOT,
    START,
)
from hashevict_vllm.kernels.triton.score import find_victims, position_of
from hashevict_vllm.kernels.triton.slots import head_of, meta_of


@triton.jit
def replay_kernel(
    signed,
    step,
    page,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: the victims of one piece's tokens beyond the budget, on one KV head.

    Token by token, as the victims of one are no candidates of the next. Losers stay in
    place: later tokens of an open segment still attend to them.

    Args:
        signed: `Signed`.
        step: `Step`.
        page: `Page`; positions in it are marked.
        rule: `DeviceRule`.
        sizes: `Sizes`.
        TILE: Slots per step of a scan.

    """
    piece = step.pieces + tl.program_id(0) * NUM_COLUMNS
    head = tl.program_id(1)
    if tl.load(piece + EVICT) != 0:
        return
    at = head_of(step, page, piece, head)
    start, row = tl.load(piece + START), tl.load(piece + ROW)
    slot, count = tl.load(piece + SLOT), tl.load(piece + COUNT)
    for i in range(tl.maximum(rule.budget - slot, 0), count):
        token = ((row + i).to(tl.int64) * step.heads + head) * (sizes.group + 1)
        sources = signed.signatures + token * sizes.hashed
        best, best_slot = find_victims(
            at, slot + i, sources, start + i, rule, sizes, TILE
        )
        found = (best == tl.max(best, 0)) & (best >= 0)
        meta = meta_of(at, best_slot, found, sizes)
        tl.store(meta + rule.words * page.word, ~position_of(best), mask=found)
        tl.debug_barrier()  # the next token's scan sees the mark


@triton.jit
def pool_kernel(
    step,
    page,
    smooth,
    pooled,
    width,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    BEFORE: tl.constexpr,
    AHEAD: tl.constexpr,
    SMOOTHS: tl.constexpr,
    TILE: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    """One program: ``TILE`` slots of one piece and KV head gather their neighbours'.

    A launch with ``SMOOTHS`` averages votes; the next takes the largest of averages.
    Slots lie in no order of position, so every slot is compared with every other.

    Args:
        step: `Step`; pieces that are not compacted are left out.
        page: `Page`.
        smooth: float32 [P, Hkv, width], read unless ``SMOOTHS``.
        pooled: float32 [P, Hkv, width], written for the piece's slots.
        width: Slots per row of ``pooled``.
        rule: `DeviceRule`; the last of a slot's words are the votes.
        sizes: `Sizes`.
        BEFORE: Neighbours are up to so many positions older,
        AHEAD: and up to so many newer.
        SMOOTHS: Whether votes of the tail are averaged, over all positions in reach,
            or ``smooth`` is maximised.
        TILE: Slots of a program.
        NEIGHBOURS: Slots compared with at a time.

    """
    index, head = tl.program_id(0), tl.program_id(1)
    piece = step.pieces + index * NUM_COLUMNS
    end = tl.load(piece + SLOT) + tl.load(piece + COUNT)
    first = tl.program_id(2) * TILE
    if (tl.load(piece + COMPACT) == 0) | (first >= end):
        return
    at = head_of(step, page, piece, head)
    slots = first + tl.arange(0, TILE)
    used = slots < end
    meta = meta_of(at, slots, used, sizes)
    position = tl.load(meta + rule.words * page.word, mask=used, other=0)
    gathered = tl.zeros([TILE], tl.float32)
    row = (index * step.heads + head).to(tl.int64) * width
    for other in range(0, end, NEIGHBOURS):
        others = other + tl.arange(0, NEIGHBOURS)
        there = others < end
        near = meta_of(at, others, there, sizes)
        if SMOOTHS:
            kept = near + (rule.words - 1) * page.word
            bits = tl.load(kept, mask=there, other=0)
            votes = bits.to(tl.float32, bitcast=True)
        else:
            votes = tl.load(smooth + row + others, mask=there, other=0.0)
        around = tl.load(near + rule.words * page.word, mask=there, other=0)
        behind = position[:, None] - around[None, :]
        close = (behind <= BEFORE) & (behind >= -AHEAD) & there[None, :]
        votes = tl.where(close, votes[None, :], 0.0)
        if SMOOTHS:
            gathered += tl.sum(votes, 1)
        else:
            gathered = tl.maximum(gathered, tl.max(votes, 1))
    if SMOOTHS:
        gathered = gathered / (BEFORE + AHEAD + 1)
    tl.store(pooled + row + slots, gathered, mask=used)


@triton.jit
def _selection_order(
    at, pooled, slots, used, stop, rule: tl.constexpr, sizes: tl.constexpr
):
    """Votes and position in one int64 [n] that orders losers; protected slots last."""
    meta = meta_of(at, slots, used, sizes)
    position = tl.load(meta + rule.words * at.page.word, mask=used, other=0)
    votes = tl.load(pooled + slots, mask=used, other=0.0)
    order = (votes.to(tl.int32, bitcast=True).to(tl.int64) << 32) | position
    free = used & (position >= rule.sinks) & (position < stop)
    return tl.where(free, order, 0x7FFFFFFFFFFFFFFF), meta, position, votes


@triton.jit
def select_kernel(
    step,
    page,
    pooled,
    width,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: all but ``budget`` slots of one piece and KV head are marked.

    The fewest pooled votes lose, of equal ones the oldest; pooled votes become the
    slots' own. The threshold is found bit by bit: it is the largest number below which
    no more slots lie than must go, and as no two slots are equal, exactly as many do.

    Args:
        step: `Step`; pieces that are not compacted are left out.
        page: `Page`; votes are replaced, positions marked.
        pooled: float32 [P, Hkv, width], from `pool_kernel`.
        width: Slots per row of ``pooled``.
        rule: `DeviceRule`; positions below its sinks are protected, and so are the
            piece's last ``recent``.
        sizes: `Sizes`.
        TILE: Slots per step.

    """
    index, head = tl.program_id(0), tl.program_id(1)
    piece = step.pieces + index * NUM_COLUMNS
    if tl.load(piece + COMPACT) == 0:
        return
    count = tl.load(piece + COUNT)
    end = tl.load(piece + SLOT) + count
    stop = tl.load(piece + START) + count - rule.recent
    at = head_of(step, page, piece, head)
    row = pooled + (index * step.heads + head).to(tl.int64) * width
    lane = tl.arange(0, TILE)
    excess = end - rule.budget
    threshold = tl.zeros([], tl.int64)
    for bit in range(63):
        candidate = threshold | (tl.full([], 1, tl.int64) << (62 - bit))
        below = 0
        for first in range(0, end, TILE):
            slots = first + lane
            used = slots < end
            order, _, _, _ = _selection_order(at, row, slots, used, stop, rule, sizes)
            below += tl.sum((order < candidate).to(tl.int32), 0)
        threshold = tl.where(below <= excess, candidate, threshold)
    for first in range(0, end, TILE):
        slots = first + lane
        used = slots < end
        order, meta, position, votes = _selection_order(
            at, row, slots, used, stop, rule, sizes
        )
        kept = meta + (rule.words - 1) * page.word
        tl.store(kept, votes.to(tl.int32, bitcast=True), mask=used)
        loses = used & (order < threshold)
        tl.store(meta + rule.words * page.word, ~position, mask=loses)
