"""Votes of queries on slots (`hashevict_vllm.policies.vote`).

A slot's words are its signature, packed numbers (`hashevict_vllm.policies.frame`) and
its votes, which are float32. How an attention logit is guessed from them is
`estimated_logits`.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
from hashevict_vllm.kernels.triton.queries import project_queries
from hashevict_vllm.kernels.triton.slots import meta_of

_NO_LOGIT = tl.constexpr(-3.4e38)
"""Of slots that get no votes; not -inf, as its distance to itself is not a number."""


@triton.jit
def estimated_logits(
    meta,
    used,
    projected,
    member,
    bits,
    word_stride,
    BITS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """Logits of queries and slots from the tail (`Vote.dot_products`).

    Args:
        meta: Pointers [n] to the slots' first words (`meta_of`).
        used: bool [n].
        projected: float32 pointer [b + 2, G'], see `project_queries`.
        member: int32 [G'], its columns.
        bits: b, unknown to the compiler, which would unroll the sum and spill.
        word_stride: Words between two words of a slot.
        BITS: b.
        MEMBERS: G'.

    Returns:
        float32 [G', n].

    """
    hashed: tl.constexpr = (BITS + 31) // 32
    total = tl.zeros([MEMBERS, used.shape[0]], tl.float32)
    for w in tl.static_range(hashed):
        word = tl.load(meta + w * word_stride, mask=used, other=0)
        for j in range(tl.minimum(bits - w * 32, 32)):
            t = tl.load(projected + (w * 32 + j) * MEMBERS + member)
            is_set = ((word >> j) & 1) != 0
            total += tl.where(is_set[None, :], t[:, None], -t[:, None])
    numbers = tl.load(meta + hashed * word_stride, mask=used, other=0)
    total *= (numbers >> 16 & 255).to(tl.float32)[None, :]
    # Two signed bytes, the lower first; unrolled, this spills too.
    for axis in range(tl.minimum(bits, 2)):
        along = (numbers << (24 - 8 * axis) >> 24).to(tl.float32)
        t = tl.load(projected + (BITS + axis) * MEMBERS + member)
        total += t[:, None] * along[None, :]
    step = ((numbers >> 24 & 255) << 23).to(tl.float32, bitcast=True)
    return total * step[None, :]


@triton.jit
def _finite(logits, used):
    """Logits [G', n], those that are not finite or not used less than any other."""
    known = used[None, :] & (tl.abs(logits) < float("inf"))
    return tl.where(known, logits, _NO_LOGIT)


@triton.jit
def cast_votes(
    tail,
    table,
    live,
    head,
    q,
    frame,
    projection,
    projected,
    scale,
    factor,
    bits,
    length,
    decay,
    decodes,
    oldest_new,
    q_head_stride,
    block_stride,
    head_stride,
    word_stride,
    WORDS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    STEP: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
):
    """The first ``live`` slots gain the most attention that a query of the group pays.

    In decode votes fade first, and slots that came since the last ballot start from the
    mean of the others. Two passes: largest logit and sum of every query, and the mean;
    then the votes. Ends with a barrier, so that the program may read what it wrote.

    Args:
        tail: int32 pointer, see `meta_of`.
        table: int32 pointer to the request's block numbers.
        live: int32, slots that stand before the voting token, at least one.
        head: KV head.
        q: Pointer to the token's first query of the group.
        frame: float64 pointer [3, D], from `write_frame`.
        projection: float32 pointer [D, b].
        projected: float32 pointer [b + 2, G'], scratch of this program.
        scale: Softmax scale.
        factor: See `hashevict_vllm.policies.vote.estimate_scale`.
        bits: See `estimated_logits`.
        length: D, likewise unknown to the compiler.
        decay: Factor on earlier votes.
        decodes: Whether the token decodes, so that votes fade.
        oldest_new: First position since the last ballot.
        q_head_stride: Elements between heads of q.
        block_stride: See `meta_of`.
        head_stride: See `meta_of`.
        word_stride: See `meta_of`.
        WORDS: Words of the rule per slot; the last are the votes.
        DIM: D.
        DIM_PADDED: The power of two from D on.
        BITS: b.
        GROUP: G.
        MEMBERS: G', a power of two.
        STEP: Elements of D per step of the projection.
        N: Slots of a block.
        TILE: Slots per step.

    """
    lane, member = tl.arange(0, TILE), tl.arange(0, MEMBERS)
    project_queries(
        q,
        q_head_stride,
        frame,
        projection,
        projected,
        scale,
        factor,
        length,
        DIM,
        DIM_PADDED,
        BITS,
        GROUP,
        MEMBERS,
        STEP,
    )
    top = tl.full([MEMBERS], _NO_LOGIT, tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    faded = tl.zeros([TILE], tl.float32)
    others = tl.zeros([TILE], tl.float32)
    for first in range(0, live, TILE):
        slots = first + lane
        used = slots < live
        meta = meta_of(tail, table, slots, used, head, block_stride, head_stride, N)
        logits = estimated_logits(
            meta, used, projected, member, bits, word_stride, BITS, MEMBERS
        )
        logits = _finite(logits, used)
        higher = tl.maximum(top, tl.max(logits, 1))
        here = tl.sum(tl.exp(logits - higher[:, None]), 1)
        total = total * tl.exp(top - higher) + here
        top = higher
        kept = meta + (WORDS - 1) * word_stride
        votes = tl.load(kept, mask=used, other=0).to(tl.float32, bitcast=True)
        position = tl.load(meta + WORDS * word_stride, mask=used, other=0)
        old = used & (position < oldest_new)
        faded += tl.where(old, votes * decay, 0.0)
        others += old.to(tl.float32)
    mean = tl.sum(faded, 0) / tl.maximum(tl.sum(others, 0), 1.0)
    share = tl.where((member < GROUP) & (top > _NO_LOGIT), 1.0 / total, 0.0)
    for first in range(0, live, TILE):
        slots = first + lane
        used = slots < live
        meta = meta_of(tail, table, slots, used, head, block_stride, head_stride, N)
        logits = estimated_logits(
            meta, used, projected, member, bits, word_stride, BITS, MEMBERS
        )
        attention = tl.exp(_finite(logits, used) - top[:, None]) * share[:, None]
        kept = meta + (WORDS - 1) * word_stride
        votes = tl.load(kept, mask=used, other=0).to(tl.float32, bitcast=True)
        position = tl.load(meta + WORDS * word_stride, mask=used, other=0)
        fade = tl.where(position < oldest_new, votes * decay, mean)
        votes = tl.where(decodes, fade, votes) + tl.max(attention, 0)
        tl.store(kept, votes.to(tl.int32, bitcast=True), mask=used)
    tl.debug_barrier()


@triton.jit
def vote_kernel(
    q,
    projection,
    projected,
    frames,
    pieces,
    block_table,
    k_cache,
    k_scale,
    tail,
    scale,
    factor,
    bits,
    length,
    decay,
    num_heads,
    q_token_stride,
    q_head_stride,
    table_stride,
    k_block_stride,
    k_head_stride,
    k_slot_stride,
    block_stride,
    head_stride,
    word_stride,
    WORDS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    EVERY: tl.constexpr,
    SINKS: tl.constexpr,
    STEP: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: the voters of one piece on one KV head, one after the other.

    A piece of a single token has voted while it was written (`write`).

    Args:
        q: [T, Hq, D], elements of a head contiguous, any float dtype.
        projection: float32 [D, b], contiguous.
        projected: float32 [P, Hkv, b + 2, G'], scratch.
        frames: float64 [P, Hkv, 3, D], scratch.
        pieces: int32 [P, columns], see `pieces`.
        block_table: int32 [R, max blocks].
        k_cache: See `load_key`; the sinks' are read.
        k_scale: See `load_key`.
        tail: int32, votes in it are updated.
        scale: See `cast_votes`.
        factor: See `cast_votes`.
        bits: See `cast_votes`.
        length: See `cast_votes`.
        decay: See `cast_votes`.
        num_heads: Hkv.
        q_token_stride: Elements between tokens of q.
        q_head_stride: Elements between heads of q.
        table_stride: Elements between rows of the block table.
        k_block_stride: See `key_rows`.
        k_head_stride: See `key_rows`.
        k_slot_stride: See `key_rows`.
        block_stride: See `meta_of`.
        head_stride: See `meta_of`.
        word_stride: See `meta_of`.
        WORDS: See `cast_votes`.
        DIM: See `cast_votes`.
        DIM_PADDED: See `cast_votes`.
        BITS: See `cast_votes`.
        GROUP: See `cast_votes`.
        MEMBERS: See `cast_votes`.
        EVERY: In decode, one token of so many votes.
        SINKS: See `write_frame`; nobody votes before they are there.
        STEP: See `cast_votes`.
        N: See `cast_votes`.
        TILE: See `cast_votes`.

    """
    index, head = tl.program_id(0), tl.program_id(1)
    piece = pieces + index * NUM_COLUMNS
    count = tl.load(piece + COUNT)
    if (count < 2) | (tl.load(piece + EVICT) != 0):
        return
    table = block_table + tl.load(piece + REQUEST).to(tl.int64) * table_stride
    row, slot = tl.load(piece + ROW), tl.load(piece + SLOT)
    start, ballots = tl.load(piece + START), tl.load(piece + BALLOTS)
    first_voter = tl.load(piece + FIRST_VOTER)
    if first_voter >= count:
        return
    scratch = index * num_heads + head
    frame = frames + scratch * (FRAME_VECTORS * DIM)
    write_frame(
        frame,
        k_cache,
        k_scale,
        table,
        head,
        k_block_stride,
        k_head_stride,
        k_slot_stride,
        SINKS,
        DIM,
        DIM_PADDED,
        N,
    )
    for i in range(first_voter, count, tl.maximum(ballots, 1)):
        token = (row + i).to(tl.int64)
        cast_votes(
            tail,
            table,
            slot + i,
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
            ballots > 0,
            start + i - EVERY,
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
