"""Votes of queries on slots (`hashevict_vllm.policies.vote`).

A slot's words are its signature, the norm of its key and its votes; the last two are
float32. How an attention logit is guessed from them is `estimated_logits`, alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels.triton.bits import popcount
from hashevict_vllm.kernels.triton.pieces import (
    COUNT,
    EVICT,
    FIRST_VOTER,
    NUM_COLUMNS,
    REQUEST,
    ROW,
    SLOT,
)
from hashevict_vllm.kernels.triton.slots import meta_of


@triton.jit
def estimated_logits(distance, key_norm, strength, cosines):
    """The logit of query and key from what the tail keeps: s |q| |k| cos(pi h / b).

    Args:
        distance: int32 [G, n], Hamming distances h.
        key_norm: float32 [n].
        strength: float32 [G], softmax scale times the query's norm.
        cosines: float32 pointer [b + 1], cos(pi h / b).

    Returns:
        float32 [G, n].

    """
    return strength[:, None] * key_norm[None, :] * tl.load(cosines + distance)


@triton.jit
def _logits_of_slots(
    meta,
    used,
    sources,
    member,
    strength,
    cosines,
    word_stride,
    HASHED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Estimated logits float32 [G', n] of slots; G' is G, padded."""
    distance = tl.zeros([member.shape[0], used.shape[0]], tl.int32)
    for w in tl.static_range(HASHED):
        word = tl.load(meta + w * word_stride, mask=used, other=0)
        source = tl.load(sources + member * HASHED + w, mask=member < GROUP, other=0)
        distance += popcount(word[None, :] ^ source[:, None])
    bits = tl.load(meta + HASHED * word_stride, mask=used, other=0)
    norm = bits.to(tl.float32, bitcast=True)
    # Rows of padding and slots not in use may differ in more than b bits.
    known = used[None, :] & (member < GROUP)[:, None]
    distance = tl.where(known, distance, 0)
    return estimated_logits(distance, norm, strength, cosines)


@triton.jit
def cast_votes(
    tail,
    table,
    live,
    head,
    sources,
    squares,
    cosines,
    scale,
    decay,
    block_stride,
    head_stride,
    word_stride,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
):
    """Votes of the first ``live`` slots decay, then grow by the group's attention.

    Two passes: the largest logit and the sum of every query, then the votes. Ends with
    a barrier, so that the program may read what it wrote.

    Args:
        tail: int32 pointer, see `meta_of`.
        table: int32 pointer to the request's block numbers.
        live: int32, slots that stand before the voting token.
        head: KV head.
        sources: int32 pointer to the token's signatures [G + 1, W'], the key's last.
        squares: float32 pointer to its squared norms [G + 1].
        cosines: float32 pointer [b + 1].
        scale: Softmax scale.
        decay: Factor on earlier votes.
        block_stride: See `meta_of`.
        head_stride: See `meta_of`.
        word_stride: See `meta_of`.
        WORDS: W' + 2.
        GROUP: G.
        MEMBERS: The power of two from G on.
        N: Slots of a block.
        TILE: Slots per step.

    """
    hashed: tl.constexpr = WORDS - 2
    lane, member = tl.arange(0, TILE), tl.arange(0, MEMBERS)
    square = tl.load(squares + member, mask=member < GROUP, other=0.0)
    strength = scale * tl.sqrt(square)
    top = tl.full([MEMBERS], float("-inf"), tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    for first in range(0, live, TILE):
        slots = first + lane
        used = slots < live
        meta = meta_of(tail, table, slots, used, head, block_stride, head_stride, N)
        logits = _logits_of_slots(
            meta, used, sources, member, strength, cosines, word_stride, hashed, GROUP
        )
        logits = tl.where(used[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        here = tl.sum(tl.exp(logits - higher[:, None]), 1)
        total = total * tl.exp(top - higher) + here
        top = higher
    share = tl.where(member < GROUP, 1.0 / tl.maximum(total, 1e-30), 0.0)
    for first in range(0, live, TILE):
        slots = first + lane
        used = slots < live
        meta = meta_of(tail, table, slots, used, head, block_stride, head_stride, N)
        logits = _logits_of_slots(
            meta, used, sources, member, strength, cosines, word_stride, hashed, GROUP
        )
        attention = tl.exp(logits - top[:, None]) * share[:, None]
        kept = meta + (WORDS - 1) * word_stride
        votes = tl.load(kept, mask=used, other=0).to(tl.float32, bitcast=True)
        votes = votes * decay + tl.sum(attention, 0)
        tl.store(kept, votes.to(tl.int32, bitcast=True), mask=used)
    tl.debug_barrier()


@triton.jit
def vote_kernel(
    signatures,
    squares,
    pieces,
    block_table,
    tail,
    cosines,
    scale,
    decay,
    num_heads,
    table_stride,
    block_stride,
    head_stride,
    word_stride,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: the voters of one piece on one KV head, one after the other.

    A piece of a single token has voted while it was written (`write`).

    Args:
        signatures: int32 [T, Hkv, G + 1, W'].
        squares: float32 [T, Hkv, G + 1].
        pieces: int32 [P, columns], see `pieces`.
        block_table: int32 [R, max blocks].
        tail: int32, votes in it are updated.
        cosines: See `cast_votes`.
        scale: See `cast_votes`.
        decay: See `cast_votes`.
        num_heads: Hkv.
        table_stride: Elements between rows of the block table.
        block_stride: See `meta_of`.
        head_stride: See `meta_of`.
        word_stride: See `meta_of`.
        WORDS: See `cast_votes`.
        GROUP: See `cast_votes`.
        MEMBERS: See `cast_votes`.
        N: See `cast_votes`.
        TILE: See `cast_votes`.

    """
    piece = pieces + tl.program_id(0) * NUM_COLUMNS
    head = tl.program_id(1)
    count = tl.load(piece + COUNT)
    if (count < 2) | (tl.load(piece + EVICT) != 0):
        return
    table = block_table + tl.load(piece + REQUEST).to(tl.int64) * table_stride
    row, slot = tl.load(piece + ROW), tl.load(piece + SLOT)
    for i in range(tl.load(piece + FIRST_VOTER), count):
        token = ((row + i).to(tl.int64) * num_heads + head) * (GROUP + 1)
        cast_votes(
            tail,
            table,
            slot + i,
            head,
            signatures + token * (WORDS - 2),
            squares + token,
            cosines,
            scale,
            decay,
            block_stride,
            head_stride,
            word_stride,
            WORDS,
            GROUP,
            MEMBERS,
            N,
            TILE,
        )
