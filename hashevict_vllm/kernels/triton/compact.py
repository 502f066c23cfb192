"""Moves the survivors of a reduced segment out of the scratch slots (design 1.3)."""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels.triton.pieces import (
    COMPACT,
    COUNT,
    NUM_COLUMNS,
    REQUEST,
    SLOT,
)
from hashevict_vllm.kernels.triton.slots import meta_of


@triton.jit
def _list_slots(
    tail,
    table,
    listed,
    begin,
    end,
    head,
    block_stride,
    head_stride,
    word_stride,
    WORDS: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    MARKED: tl.constexpr,
):
    """List the slots of [begin, end) that are marked (or are not), ascending.

    Args:
        tail: See `meta_of`.
        table: See `meta_of`.
        listed: int32 pointer; every other element from here on is written.
        begin: First slot.
        end: Slot after the last.
        head: KV head.
        block_stride: See `meta_of`.
        head_stride: See `meta_of`.
        word_stride: See `meta_of`.
        WORDS: Words before the position.
        N: Slots of a block.
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
        meta = meta_of(tail, table, slots, used, head, block_stride, head_stride, N)
        position = tl.load(meta + WORDS * word_stride, mask=used, other=0)
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
    pieces,
    block_table,
    tail,
    moves,
    num_moves,
    num_heads,
    width,
    table_stride,
    block_stride,
    head_stride,
    word_stride,
    WORDS: tl.constexpr,
    BUDGET: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: which survivor of one piece and KV head goes into which hole.

    Both in order of their slots. As many slots below the budget are marked as survive
    beyond it, since all but C are marked.

    Args:
        pieces: int32 [P, columns]; those that are not compacted move nothing.
        block_table: int32 [R, max blocks].
        tail: int32, see `meta_of`.
        moves: int32 [P, Hkv, width, 2], written: hole and survivor.
        num_moves: int32 [P, Hkv], written.
        num_heads: Hkv.
        width: Room for moves per piece and KV head.
        table_stride: Elements between rows of the block table.
        block_stride: See `meta_of`.
        head_stride: See `meta_of`.
        word_stride: See `meta_of`.
        WORDS: Words before the position.
        BUDGET: C.
        N: Slots of a block.
        TILE: Slots per step.

    """
    index, head = tl.program_id(0), tl.program_id(1)
    piece = pieces + index * NUM_COLUMNS
    row = (index * num_heads + head).to(tl.int64)
    if tl.load(piece + COMPACT) == 0:
        tl.store(num_moves + row, 0)
        return
    table = block_table + tl.load(piece + REQUEST).to(tl.int64) * table_stride
    end = tl.load(piece + SLOT) + tl.load(piece + COUNT)
    holes = moves + row * width * 2
    found = _list_slots(
        tail,
        table,
        holes,
        0,
        BUDGET,
        head,
        block_stride,
        head_stride,
        word_stride,
        WORDS,
        N,
        TILE,
        True,
    )
    tl.store(num_moves + row, found)
    _list_slots(
        tail,
        table,
        holes + 1,
        BUDGET,
        end,
        head,
        block_stride,
        head_stride,
        word_stride,
        WORDS,
        N,
        TILE,
        False,
    )


@triton.jit
def _move_rows(
    cache,
    from_block,
    to_block,
    from_offset,
    to_offset,
    used,
    head,
    block_stride,
    head_stride,
    slot_stride,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    """Copy rows of D raw elements of K or V, several slots at once."""
    d = tl.arange(0, DIM_PADDED)
    source = from_block * block_stride + head * head_stride + from_offset * slot_stride
    target = to_block * block_stride + head * head_stride + to_offset * slot_stride
    mask = used[:, None] & (d < DIM)[None, :]
    x = tl.load(cache + source[:, None] + d[None, :], mask=mask)
    tl.store(cache + target[:, None] + d[None, :], x, mask=mask)


@triton.jit
def move_kernel(
    pieces,
    block_table,
    k_cache,
    v_cache,
    tail,
    moves,
    num_moves,
    num_heads,
    width,
    table_stride,
    k_block_stride,
    k_head_stride,
    k_slot_stride,
    v_block_stride,
    v_head_stride,
    v_slot_stride,
    block_stride,
    head_stride,
    word_stride,
    WORDS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: up to ``ROWS`` moves of one piece and KV head.

    Sources lie beyond the budget and targets below it, so moves do not meet.

    Args:
        pieces: int32 [P, columns].
        block_table: int32 [R, max blocks].
        k_cache: K as integers of the element's size, see `write_kernel`.
        v_cache: The same for V.
        tail: int32, see `meta_of`.
        moves: int32 [P, Hkv, width, 2], from `pair_kernel`.
        num_moves: int32 [P, Hkv], likewise.
        num_heads: Hkv.
        width: Room for moves per piece and KV head.
        table_stride: Elements between rows of the block table.
        k_block_stride: Elements between blocks of K.
        k_head_stride: Elements between heads of K in a page.
        k_slot_stride: Elements between slots of K.
        v_block_stride: Elements between blocks of V.
        v_head_stride: Elements between heads of V in a page.
        v_slot_stride: Elements between slots of V.
        block_stride: Words between blocks of the tail.
        head_stride: Words between heads of the tail.
        word_stride: Words between two words of a slot.
        WORDS: Words before the position.
        DIM: D.
        DIM_PADDED: The power of two from D on.
        N: Slots of a block.
        ROWS: Moves of a program.

    """
    index, head = tl.program_id(0), tl.program_id(1)
    row = (index * num_heads + head).to(tl.int64)
    first = tl.program_id(2) * ROWS
    count = tl.load(num_moves + row)
    if first >= count:
        return
    piece = pieces + index * NUM_COLUMNS
    table = block_table + tl.load(piece + REQUEST).to(tl.int64) * table_stride
    rank = first + tl.arange(0, ROWS)
    used = rank < count
    move = moves + (row * width + rank) * 2
    hole = tl.load(move, mask=used, other=0)
    survivor = tl.load(move + 1, mask=used, other=0)
    from_block = tl.load(table + survivor // N, mask=used, other=0).to(tl.int64)
    to_block = tl.load(table + hole // N, mask=used, other=0).to(tl.int64)
    from_offset, to_offset = survivor % N, hole % N
    _move_rows(
        k_cache,
        from_block,
        to_block,
        from_offset,
        to_offset,
        used,
        head,
        k_block_stride,
        k_head_stride,
        k_slot_stride,
        DIM,
        DIM_PADDED,
    )
    _move_rows(
        v_cache,
        from_block,
        to_block,
        from_offset,
        to_offset,
        used,
        head,
        v_block_stride,
        v_head_stride,
        v_slot_stride,
        DIM,
        DIM_PADDED,
    )
    source = meta_of(tail, table, survivor, used, head, block_stride, head_stride, N)
    target = meta_of(tail, table, hole, used, head, block_stride, head_stride, N)
    for w in tl.static_range(WORDS + 1):
        word = tl.load(source + w * word_stride, mask=used, other=0)
        tl.store(target + w * word_stride, word, mask=used)
