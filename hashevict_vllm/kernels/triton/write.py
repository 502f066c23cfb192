"""Evict and write: one launch per layer and round (design 1.2)."""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.triton.frame import FRAME_VECTORS, write_frame
from hashevict_vllm.kernels.triton.pieces import (
    BALLOTS,
    COUNT,
    EVICT,
    FIRST_VOTER,
    NUM_COLUMNS,
    REQUEST,
    ROW,
    SLOT,
    START,
)
from hashevict_vllm.kernels.triton.score import NORM, VOTE, find_victims
from hashevict_vllm.kernels.triton.slots import meta_of
from hashevict_vllm.kernels.triton.votes import cast_votes

NOT_A_NUMBER = tl.constexpr(codes.NOT_A_NUMBER)


@triton.jit
def _write_element_row(
    source, target, scale, DIM: tl.constexpr, DIM_PADDED: tl.constexpr
):
    """Copy one row of D elements, divided by ``scale`` where there is one (fp8)."""
    d = tl.arange(0, DIM_PADDED)
    x = tl.load(source + d, mask=d < DIM, other=0.0)
    if scale is not None:
        x = x.to(tl.float32) / tl.load(scale)
    tl.store(target + d, x.to(target.dtype.element_ty), mask=d < DIM)


@triton.jit
def _write_words(
    meta,
    word_stride,
    signature,
    square,
    KIND: tl.constexpr,
    HASHED: tl.constexpr,
):
    """What a slot keeps of its key (`EvictionRule.words`)."""
    for w in tl.static_range(HASHED):
        tl.store(meta + w * word_stride, tl.load(signature + w))
    if KIND == NORM:
        x = tl.load(square)
        bits = x.to(tl.int32, bitcast=True)
        tl.store(meta, tl.where(x == x, bits, NOT_A_NUMBER))


@triton.jit
def write_kernel(
    q,
    k,
    v,
    signatures,
    squares,
    pieces,
    token_piece,
    block_table,
    k_cache,
    v_cache,
    tail,
    k_scale,
    v_scale,
    projection,
    projected,
    frames,
    slots,
    scale,
    factor,
    bits,
    length,
    decay,
    num_heads,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    table_stride,
    k_block_stride,
    k_head_page_stride,
    k_slot_stride,
    v_block_stride,
    v_head_page_stride,
    v_slot_stride,
    block_stride,
    head_stride,
    word_stride,
    KIND: tl.constexpr,
    WORDS: tl.constexpr,
    HASHED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    SALT: tl.constexpr,
    EVERY: tl.constexpr,
    STEP: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    SCANS: tl.constexpr,
):
    """One program: one token on one KV head.

    A token of an evicting piece votes (if its rule votes), finds its victim and takes
    its slot; others take the slot that the piece names. Tokens of one request depend on
    each other's slots only where a piece evicts, and such a piece is one token long.

    Args:
        q: [T, Hq, D], read by rules that vote.
        k: [T, Hkv, D], elements of a head contiguous, any float dtype.
        v: [T, Hkv, D], likewise.
        signatures: int32 [T, Hkv, G + 1, W'], see `sign_kernel`; unused if W' is 0.
        squares: float32 [T, Hkv, G + 1], likewise; used by rules that keep norms.
        pieces: int32 [P, columns], see `pieces`.
        token_piece: int32 [T], row of ``pieces`` of each token; -1 for padding.
        block_table: int32 [R, max blocks].
        k_cache: Pointer to K of block 0, head 0, slot 0; elements of a slot contiguous.
        v_cache: The same for V.
        tail: int32, see `meta_of`.
        k_scale: float32 [1], what fp8 slots are divided by; None for other dtypes.
        v_scale: The same for V.
        projection: float32 [D, b], read by rules that vote.
        projected: float32 [P, Hkv, b + 2, G'], their scratch.
        frames: float64 [P, Hkv, 3, D], likewise.
        slots: int32 [T, Hkv], written by rules that vote: where each token went.
        scale: See `cast_votes`.
        factor: See `cast_votes`.
        bits: See `cast_votes`.
        length: See `cast_votes`.
        decay: Factor on earlier votes.
        num_heads: Hkv.
        q_token_stride: Elements between tokens of q.
        q_head_stride: Elements between heads of q.
        k_token_stride: Elements between tokens of k.
        k_head_stride: Elements between heads of k.
        v_token_stride: Elements between tokens of v.
        v_head_stride: Elements between heads of v.
        table_stride: Elements between rows of the block table.
        k_block_stride: Elements between blocks of K.
        k_head_page_stride: Elements between heads of K in a page.
        k_slot_stride: Elements between slots of K.
        v_block_stride: Elements between blocks of V.
        v_head_page_stride: Elements between heads of V in a page.
        v_slot_stride: Elements between slots of V.
        block_stride: Words between blocks of the tail.
        head_stride: Words between heads of the tail.
        word_stride: Words between two words of a slot.
        KIND: Kind of score, see `hashevict_vllm.kernels.codes`.
        WORDS: Words of the rule per slot.
        HASHED: Those of them that are the signature, W'.
        BITS: b.
        GROUP: G.
        MEMBERS: The power of two from G on.
        SALT: See `mix`.
        EVERY: In decode, one token of so many votes.
        STEP: See `cast_votes`.
        SINKS: Positions below are protected.
        RECENT: Positions above ``t - 1 - recent`` are protected.
        DIM: D.
        DIM_PADDED: The power of two from D on.
        N: Slots of a block.
        TILE: Slots per step of the scan.
        SCANS: Whether any piece may evict or vote; False leaves the scan out.

    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    owner = tl.load(token_piece + token)
    if owner < 0:
        return
    piece = pieces + owner * NUM_COLUMNS
    i = token.to(tl.int32) - tl.load(piece + ROW)
    count = tl.load(piece + COUNT)
    if (i < 0) | (i >= count):
        return  # belongs to another round
    table = block_table + tl.load(piece + REQUEST).to(tl.int64) * table_stride
    slot = tl.load(piece + SLOT) + i
    position = tl.load(piece + START) + i
    first = (token * num_heads + head) * (GROUP + 1)
    sources = signatures + first * HASHED
    if SCANS:
        if KIND == VOTE:
            scratch = owner * num_heads + head
            if (count == 1) & (tl.load(piece + FIRST_VOTER) == 0):
                frame = frames + scratch * (FRAME_VECTORS * DIM)
                write_frame(
                    frame,
                    k_cache,
                    k_scale,
                    table,
                    head,
                    k_block_stride,
                    k_head_page_stride,
                    k_slot_stride,
                    SINKS,
                    DIM,
                    DIM_PADDED,
                    N,
                )
                cast_votes(
                    tail,
                    table,
                    slot,
                    head,
                    q + token * q_token_stride + head * GROUP * q_head_stride,
                    frame,
                    projection,
                    projected + scratch * ((BITS + 2) * MEMBERS),
                    scale,
                    factor,
                    bits,
                    length,
                    decay,
                    tl.load(piece + BALLOTS) > 0,
                    position - EVERY,
                    q_head_stride,
                    block_stride,
                    head_stride,
                    word_stride,
                    WORDS,
                    DIM,
                    DIM_PADDED,
                    BITS,
                    GROUP,
                    MEMBERS,
                    STEP,
                    N,
                    TILE,
                )
        if tl.load(piece + EVICT) != 0:
            best, best_slot = find_victims(
                tail,
                table,
                slot,
                head,
                sources,
                position,
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
            slot = tl.max(tl.where(best == tl.max(best, 0), best_slot, -1), 0)
        # What the scan read and wrote may be in the victim's slot.
        tl.debug_barrier()
    block = tl.load(table + slot // N).to(tl.int64)
    offset = slot % N
    _write_element_row(
        k + token * k_token_stride + head * k_head_stride,
        k_cache
        + block * k_block_stride
        + head * k_head_page_stride
        + offset * k_slot_stride,
        k_scale,
        DIM,
        DIM_PADDED,
    )
    _write_element_row(
        v + token * v_token_stride + head * v_head_stride,
        v_cache
        + block * v_block_stride
        + head * v_head_page_stride
        + offset * v_slot_stride,
        v_scale,
        DIM,
        DIM_PADDED,
    )
    meta = meta_of(tail, table, slot, slot >= 0, head, block_stride, head_stride, N)
    tl.store(meta + WORDS * word_stride, position)
    if KIND == VOTE:
        tl.store(slots + token * num_heads + head, slot)  # `describe` goes on there
    else:
        _write_words(
            meta,
            word_stride,
            sources + GROUP * HASHED,
            squares + first + GROUP,
            KIND,
            HASHED,
        )
