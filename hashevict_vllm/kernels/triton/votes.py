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
    ROW,
    SLOT,
    START,
)
from hashevict_vllm.kernels.triton.queries import project_queries
from hashevict_vllm.kernels.triton.slots import head_of, meta_of


@triton.jit
def estimated_logits(
    meta,
    used,
    projected,
    member,
    bits,
    word_stride,
    rule: tl.constexpr,
    sizes: tl.constexpr,
):
    """Logits of queries and slots from the tail (`Vote.dot_products`).

    Args:
        meta: Pointers [n] to the slots' first words (`meta_of`).
        used: bool [n].
        projected: float32 pointer [b + 2, G'], see `project_queries`.
        member: int32 [G'], its columns.
        bits: b, unknown to the compiler, which would unroll the sum and spill.
        word_stride: Words between two words of a slot.
        rule: `DeviceRule`.
        sizes: `Sizes`.

    Returns:
        float32 [G', n].

    """
    hashed: tl.constexpr = sizes.hashed
    members: tl.constexpr = sizes.members
    total = tl.zeros([members, used.shape[0]], tl.float32)
    for w in tl.static_range(hashed):
        word = tl.load(meta + w * word_stride, mask=used, other=0)
        for j in range(tl.minimum(bits - w * 32, 32)):
            t = tl.load(projected + (w * 32 + j) * members + member)
            is_set = ((word >> j) & 1) != 0
            total += tl.where(is_set[None, :], t[:, None], -t[:, None])
    numbers = tl.load(meta + hashed * word_stride, mask=used, other=0)
    total *= (numbers >> 16 & 255).to(tl.float32)[None, :]
    # Two signed bytes, the lower first; unrolled, this spills too.
    for axis in range(tl.minimum(bits, 2)):
        along = (numbers << (24 - 8 * axis) >> 24).to(tl.float32)
        t = tl.load(projected + (rule.bits + axis) * members + member)
        total += t[:, None] * along[None, :]
    step = ((numbers >> 24 & 255) << 23).to(tl.float32, bitcast=True)
    return total * step[None, :]


@triton.jit
def cast_votes(
    at,
    live,
    q,
    q_head,
    frame,
    projected,
    estimate,
    decodes,
    oldest_new,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
):
    """The first ``live`` slots gain the most attention that a query of the group pays.

    In decode votes fade first, and slots that came since the last ballot start from the
    mean of the others. Two passes: largest logit and sum of every query, and the mean;
    then the votes. Ends with a barrier, so that the program may read what it wrote.

    Args:
        at: `Head`.
        live: int32, slots that stand before the voting token, at least one.
        q: Pointer to the token's first query of the group.
        q_head: Elements between heads of q.
        frame: float64 pointer [3, D], from `write_frame`.
        projected: float32 pointer [b + 2, G'], scratch of this program.
        estimate: `Estimate`.
        decodes: Whether the token decodes, so that votes fade.
        oldest_new: First position since the last ballot.
        rule: `DeviceRule`; the last of a slot's words are the votes.
        sizes: `Sizes`.
        STEP: Elements of D per step of the projection.
        TILE: Slots per step.

    """
    members: tl.constexpr = sizes.members
    lane, member = tl.arange(0, TILE), tl.arange(0, members)
    project_queries(q, q_head, frame, projected, estimate, rule, sizes, STEP)
    bits, decay, word = estimate.bits, estimate.decay, at.page.word
    top = tl.full([members], float("-inf"), tl.float32)
    total = tl.zeros([members], tl.float32)
    faded = tl.zeros([TILE], tl.float32)
    others = tl.zeros([TILE], tl.float32)
    for first in range(0, live, TILE):
        slots = first + lane
        used = slots < live
        meta = meta_of(at, slots, used, sizes)
        logits = estimated_logits(
            meta, used, projected, member, bits, word, rule, sizes
        )
        logits = tl.where(used[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        here = tl.sum(tl.exp(logits - higher[:, None]), 1)
        total = total * tl.exp(top - higher) + here
        top = higher
        kept = meta + (rule.words - 1) * word
        votes = tl.load(kept, mask=used, other=0).to(tl.float32, bitcast=True)
        position = tl.load(meta + rule.words * word, mask=used, other=0)
        old = used & (position < oldest_new)
        faded += tl.where(old, votes * decay, 0.0)
        others += old.to(tl.float32)
    mean = tl.sum(faded, 0) / tl.maximum(tl.sum(others, 0), 1.0)
    share = tl.where(member < sizes.group, 1.0 / total, 0.0)
    for first in range(0, live, TILE):
        slots = first + lane
        used = slots < live
        meta = meta_of(at, slots, used, sizes)
        logits = estimated_logits(
            meta, used, projected, member, bits, word, rule, sizes
        )
        attention = tl.exp(logits - top[:, None]) * share[:, None]
        kept = meta + (rule.words - 1) * word
        votes = tl.load(kept, mask=used, other=0).to(tl.float32, bitcast=True)
        position = tl.load(meta + rule.words * word, mask=used, other=0)
        fade = tl.where(position < oldest_new, votes * decay, mean)
        votes = tl.where(decodes, fade, votes) + tl.max(attention, 0)
        tl.store(kept, votes.to(tl.int32, bitcast=True), mask=used)
    tl.debug_barrier()


@triton.jit
def vote_kernel(
    tokens,
    step,
    page,
    estimate,
    projected,
    frames,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: the voters of one piece on one KV head, one after the other.

    A piece of a single token has voted while it was written (`write`).

    Args:
        tokens: `Tokens`.
        step: `Step`.
        page: `Page`; votes are updated, the sinks' keys read.
        estimate: `Estimate`.
        projected: float32 [P, Hkv, b + 2, G'], scratch.
        frames: float64 [P, Hkv, 3, D], scratch.
        rule: `DeviceRule`; nobody votes before the sinks are there.
        sizes: `Sizes`.
        STEP: See `cast_votes`.
        TILE: See `cast_votes`.

    """
    index, head = tl.program_id(0), tl.program_id(1)
    piece = step.pieces + index * NUM_COLUMNS
    count = tl.load(piece + COUNT)
    if (count < 2) | (tl.load(piece + EVICT) != 0):
        return
    row, slot = tl.load(piece + ROW), tl.load(piece + SLOT)
    start, ballots = tl.load(piece + START), tl.load(piece + BALLOTS)
    first_voter = tl.load(piece + FIRST_VOTER)
    if first_voter >= count:
        return
    at = head_of(step, page, piece, head)
    scratch = index * step.heads + head
    frame = frames + scratch * (FRAME_VECTORS * sizes.dim)
    write_frame(frame, at, rule, sizes)
    for i in range(first_voter, count, tl.maximum(ballots, 1)):
        token = (row + i).to(tl.int64)
        cast_votes(
            at,
            slot + i,
            tokens.q + token * tokens.q_token + head * sizes.group * tokens.q_head,
            tokens.q_head,
            frame,
            projected + scratch * ((rule.bits + 2) * sizes.members),
            estimate,
            ballots > 0,
            start + i - rule.every,
            rule,
            sizes,
            STEP,
            TILE,
        )
