"""Signatures and norms of centred keys, for rules that vote.

See `hashevict_vllm.policies.vote.Vote.centred_keys`. Sinks are appended first and never
evicted or moved, so slot i holds position i, and their mean key can be read again from
the page at every step. Keys are read where `write` has put them: those of a prompt's
first chunk and its sinks arrive in one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels.triton.pieces import (
    COUNT,
    NUM_COLUMNS,
    REQUEST,
    ROW,
    START,
)
from hashevict_vllm.kernels.triton.slots import meta_of


@triton.jit
def _keys(
    k_cache,
    k_scale,
    table,
    slots,
    used,
    dims,
    head,
    block_stride,
    head_stride,
    slot_stride,
    DIM: tl.constexpr,
    N: tl.constexpr,
):
    """Elements float32 [M, n] of stored keys; ``table`` are pointers [M]."""
    block = tl.load(table + slots // N, mask=used, other=0).to(tl.int64)
    rows = block * block_stride + head * head_stride + slots % N * slot_stride
    x = tl.load(
        k_cache + rows[:, None] + dims[None, :],
        mask=used[:, None] & (dims < DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    return x if k_scale is None else x * tl.load(k_scale)


@triton.jit(do_not_specialize=["num_tokens", "token_programs"])
def describe_kernel(
    projection,
    pieces,
    token_piece,
    slots,
    block_table,
    k_cache,
    k_scale,
    tail,
    num_tokens,
    token_programs,
    num_heads,
    table_stride,
    k_block_stride,
    k_head_stride,
    k_slot_stride,
    block_stride,
    head_stride,
    word_stride,
    SINKS: tl.constexpr,
    WORDS: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    N: tl.constexpr,
):
    """One program: ``TOKENS`` slots of one KV head; its votes start at zero.

    The first ``token_programs`` describe tokens that lie beyond the sinks. Then there
    is one for every piece, which describes all sinks if their last one is in it.

    Args:
        projection: float32 [D, b], contiguous.
        pieces: int32 [P, columns], see `pieces`.
        token_piece: int32 [T], row of ``pieces`` of each token; -1 for padding.
        slots: int32 [T, Hkv], where `write` has put each token.
        block_table: int32 [R, max blocks].
        k_cache: See `write_kernel`.
        k_scale: float32 [1], what fp8 slots are multiplied by; None for other dtypes.
        tail: int32, see `meta_of`; signature, norm and votes are written.
        num_tokens: T.
        token_programs: Programs of the first kind.
        num_heads: Hkv.
        table_stride: Elements between rows of the block table.
        k_block_stride: Elements between blocks of K.
        k_head_stride: Elements between heads of K in a page.
        k_slot_stride: Elements between slots of K.
        block_stride: See `meta_of`.
        head_stride: See `meta_of`.
        word_stride: See `meta_of`.
        SINKS: Positions below are the sinks; all but the first are the centre.
        WORDS: Words of the rule per slot: signature, norm, votes.
        DIM: D.
        BITS: b.
        COLUMNS: The power of two from b on, at least 32.
        TOKENS: Slots of a program, a power of two and at least ``SINKS``.
        STEP: Elements of D per step of the product.
        N: Slots of a block.

    """
    program, head = tl.program_id(0), tl.program_id(1)
    index = tl.arange(0, TOKENS)
    if program < token_programs:
        row = program * TOKENS + index
        owner = tl.load(token_piece + row, mask=row < num_tokens, other=-1)
        used = owner >= 0
        piece = pieces + owner * NUM_COLUMNS
        i = row - tl.load(piece + ROW, mask=used, other=0)
        used = used & (i >= 0) & (i < tl.load(piece + COUNT, mask=used, other=0))
        position = i + tl.load(piece + START, mask=used, other=0)
        used = used & (position >= SINKS)
        slot = tl.load(slots + row * num_heads + head, mask=used, other=0)
    else:
        owner = tl.zeros([TOKENS], tl.int32) + (program - token_programs)
        piece = pieces + owner * NUM_COLUMNS
        start, count = tl.load(piece + START), tl.load(piece + COUNT)
        arrives = (start < SINKS) & (start + count >= SINKS)
        used = arrives & (index < SINKS)
        slot = index
    if tl.max(used.to(tl.int32), 0) == 0:
        return
    request = tl.load(pieces + owner * NUM_COLUMNS + REQUEST, mask=used, other=0)
    table = block_table + request.to(tl.int64) * table_stride
    column = tl.arange(0, COLUMNS)
    dots = tl.zeros([TOKENS, COLUMNS], tl.float32)
    square = tl.zeros([TOKENS], tl.float32)
    for first in range(0, DIM, STEP):
        dims = first + tl.arange(0, STEP)
        centre = tl.zeros([TOKENS, STEP], tl.float32)
        for sink in range(1, SINKS):
            centre += _keys(
                k_cache,
                k_scale,
                table,
                tl.zeros([TOKENS], tl.int32) + sink,
                used,
                dims,
                head,
                k_block_stride,
                k_head_stride,
                k_slot_stride,
                DIM,
                N,
            )
        x = _keys(
            k_cache,
            k_scale,
            table,
            slot,
            used,
            dims,
            head,
            k_block_stride,
            k_head_stride,
            k_slot_stride,
            DIM,
            N,
        )
        x -= centre * (1.0 / max(SINKS - 1, 1))
        r = tl.load(
            projection + dims[:, None] * BITS + column[None, :],
            mask=(dims < DIM)[:, None] & (column < BITS)[None, :],
            other=0.0,
        )
        dots = tl.dot(x, r, dots, input_precision="ieee")
        square += tl.sum(x * x, 1)
    ones = ((dots >= 0) & (column < BITS)[None, :]).to(tl.int32) << (column % 32)
    words = tl.sum(tl.reshape(ones, (TOKENS, COLUMNS // 32, 32)), 2)
    meta = meta_of(tail, table, slot, used, head, block_stride, head_stride, N)
    w = tl.arange(0, COLUMNS // 32)
    tl.store(
        meta[:, None] + w[None, :] * word_stride,
        words,
        mask=used[:, None] & (w < WORDS - 2)[None, :],
    )
    norm = tl.sqrt(square).to(tl.int32, bitcast=True)
    tl.store(meta + (WORDS - 2) * word_stride, norm, mask=used)
    tl.store(meta + (WORDS - 1) * word_stride, tl.zeros([TOKENS], tl.int32), mask=used)
