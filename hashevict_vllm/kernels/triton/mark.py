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
    REQUEST,
    ROW,
    SLOT,
    START,
)
from hashevict_vllm.kernels.triton.score import find_victims, position_of
from hashevict_vllm.kernels.triton.slots import meta_of


@triton.jit
def replay_kernel(
    signatures,
    pieces,
    block_table,
    tail,
    num_heads,
    table_stride,
    block_stride,
    head_stride,
    word_stride,
    KIND: tl.constexpr,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    SALT: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    BUDGET: tl.constexpr,
    HASHED: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: the victims of one piece's tokens beyond the budget, on one KV head.

    Token by token, as the victims of one are no candidates of the next. Losers stay in
    place: later tokens of an open segment still attend to them.

    Args:
        signatures: int32 [T, Hkv, G + 1, W'], see `sign_kernel`.
        pieces: int32 [P, columns], see `pieces`.
        block_table: int32 [R, max blocks].
        tail: int32, see `meta_of`; positions in it are marked.
        num_heads: Hkv.
        table_stride: Elements between rows of the block table.
        block_stride: See `meta_of`.
        head_stride: See `meta_of`.
        word_stride: See `meta_of`.
        KIND: See `slot_scores`.
        WORDS: See `slot_scores`.
        GROUP: See `slot_scores`.
        SALT: See `mix`.
        SINKS: See `find_victims`.
        RECENT: See `find_victims`.
        BUDGET: C.
        HASHED: W'.
        N: Slots of a block.
        TILE: Slots per step of a scan.

    """
    piece = pieces + tl.program_id(0) * NUM_COLUMNS
    head = tl.program_id(1)
    if tl.load(piece + EVICT) != 0:
        return
    table = block_table + tl.load(piece + REQUEST).to(tl.int64) * table_stride
    start, row = tl.load(piece + START), tl.load(piece + ROW)
    slot, count = tl.load(piece + SLOT), tl.load(piece + COUNT)
    for i in range(tl.maximum(BUDGET - slot, 0), count):
        token = ((row + i).to(tl.int64) * num_heads + head) * (GROUP + 1)
        best, best_slot = find_victims(
            tail,
            table,
            slot + i,
            head,
            signatures + token * HASHED,
            start + i,
            block_stride,
            head_stride,
            word_stride,
            KIND,
            WORDS,
            GROUP,
            SALT,
            SINKS,
            RECENT,
            N,
            TILE,
        )
        top = tl.max(best, 0)
        found = (best == top) & (best >= 0)
        meta = meta_of(
            tail, table, best_slot, found, head, block_stride, head_stride, N
        )
        tl.store(meta + WORDS * word_stride, ~position_of(best), mask=found)
        tl.debug_barrier()  # the next token's scan sees the mark


@triton.jit
def pool_kernel(
    pieces,
    block_table,
    tail,
    smooth,
    pooled,
    num_heads,
    width,
    table_stride,
    block_stride,
    head_stride,
    word_stride,
    WORDS: tl.constexpr,
    BEFORE: tl.constexpr,
    AHEAD: tl.constexpr,
    SMOOTHS: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    """One program: ``TILE`` slots of one piece and KV head gather their neighbours'.

    A launch with ``SMOOTHS`` averages votes; the next takes the largest of averages.
    Slots lie in no order of position, so every slot is compared with every other.

    Args:
        pieces: int32 [P, columns]; those that are not compacted are left out.
        block_table: int32 [R, max blocks].
        tail: int32, see `meta_of`.
        smooth: float32 [P, Hkv, width], read unless ``SMOOTHS``.
        pooled: float32 [P, Hkv, width], written for the piece's slots.
        num_heads: Hkv.
        width: Slots per row of ``pooled``.
        table_stride: Elements between rows of the block table.
        block_stride: See `meta_of`.
        head_stride: See `meta_of`.
        word_stride: See `meta_of`.
        WORDS: Words of the rule per slot; the last are the votes.
        BEFORE: Neighbours are up to so many positions older,
        AHEAD: and up to so many newer.
        SMOOTHS: Whether votes of the tail are averaged, over all positions in reach,
            or ``smooth`` is maximised.
        N: Slots of a block.
        TILE: Slots of a program.
        NEIGHBOURS: Slots compared with at a time.

    """
    index, head = tl.program_id(0), tl.program_id(1)
    piece = pieces + index * NUM_COLUMNS
    end = tl.load(piece + SLOT) + tl.load(piece + COUNT)
    first = tl.program_id(2) * TILE
    if (tl.load(piece + COMPACT) == 0) | (first >= end):
        return
    table = block_table + tl.load(piece + REQUEST).to(tl.int64) * table_stride
    slots = first + tl.arange(0, TILE)
    used = slots < end
    meta = meta_of(tail, table, slots, used, head, block_stride, head_stride, N)
    position = tl.load(meta + WORDS * word_stride, mask=used, other=0)
    gathered = tl.zeros([TILE], tl.float32)
    row = (index * num_heads + head).to(tl.int64) * width
    for other in range(0, end, NEIGHBOURS):
        others = other + tl.arange(0, NEIGHBOURS)
        there = others < end
        near = meta_of(tail, table, others, there, head, block_stride, head_stride, N)
        if SMOOTHS:
            bits = tl.load(near + (WORDS - 1) * word_stride, mask=there, other=0)
            votes = bits.to(tl.float32, bitcast=True)
        else:
            votes = tl.load(smooth + row + others, mask=there, other=0.0)
        at = tl.load(near + WORDS * word_stride, mask=there, other=0)
        behind = position[:, None] - at[None, :]
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
    meta, pooled, used, stop, word_stride, WORDS: tl.constexpr, SINKS: tl.constexpr
):
    """Votes and position in one int64 [n] that orders losers; protected slots last."""
    position = tl.load(meta + WORDS * word_stride, mask=used, other=0)
    votes = tl.load(pooled, mask=used, other=0.0)
    order = (votes.to(tl.int32, bitcast=True).to(tl.int64) << 32) | position
    free = used & (position >= SINKS) & (position < stop)
    return tl.where(free, order, 0x7FFFFFFFFFFFFFFF), position, votes


@triton.jit
def select_kernel(
    pieces,
    block_table,
    tail,
    pooled,
    num_heads,
    width,
    table_stride,
    block_stride,
    head_stride,
    word_stride,
    WORDS: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    BUDGET: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: all but ``BUDGET`` slots of one piece and KV head are marked.

    The fewest pooled votes lose, of equal ones the oldest; pooled votes become the
    slots' own. The threshold is found bit by bit: it is the largest number below which
    no more slots lie than must go, and as no two slots are equal, exactly as many do.

    Args:
        pieces: As `pool_kernel`.
        block_table: As `pool_kernel`.
        tail: int32; votes are replaced, positions marked.
        pooled: float32 [P, Hkv, width], from `pool_kernel`.
        num_heads: Hkv.
        width: Slots per row of ``pooled``.
        table_stride: Elements between rows of the block table.
        block_stride: See `meta_of`.
        head_stride: See `meta_of`.
        word_stride: See `meta_of`.
        WORDS: As `pool_kernel`.
        SINKS: Positions below are protected.
        RECENT: So are the piece's last positions, as many.
        BUDGET: C.
        N: Slots of a block.
        TILE: Slots per step.

    """
    index, head = tl.program_id(0), tl.program_id(1)
    piece = pieces + index * NUM_COLUMNS
    if tl.load(piece + COMPACT) == 0:
        return
    count = tl.load(piece + COUNT)
    end = tl.load(piece + SLOT) + count
    stop = tl.load(piece + START) + count - RECENT
    table = block_table + tl.load(piece + REQUEST).to(tl.int64) * table_stride
    row = pooled + (index * num_heads + head).to(tl.int64) * width
    lane = tl.arange(0, TILE)
    excess = end - BUDGET
    threshold = tl.zeros([], tl.int64)
    for bit in range(63):
        candidate = threshold | (tl.full([], 1, tl.int64) << (62 - bit))
        below = 0
        for first in range(0, end, TILE):
            slots = first + lane
            used = slots < end
            meta = meta_of(tail, table, slots, used, head, block_stride, head_stride, N)
            order, _, _ = _selection_order(
                meta, row + slots, used, stop, word_stride, WORDS, SINKS
            )
            below += tl.sum((order < candidate).to(tl.int32), 0)
        threshold = tl.where(below <= excess, candidate, threshold)
    for first in range(0, end, TILE):
        slots = first + lane
        used = slots < end
        meta = meta_of(tail, table, slots, used, head, block_stride, head_stride, N)
        order, position, votes = _selection_order(
            meta, row + slots, used, stop, word_stride, WORDS, SINKS
        )
        tl.store(
            meta + (WORDS - 1) * word_stride,
            votes.to(tl.int32, bitcast=True),
            mask=used,
        )
        loses = used & (order < threshold)
        tl.store(meta + WORDS * word_stride, ~position, mask=loses)
