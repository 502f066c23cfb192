"""Ballots of tokens that decode (`hashevict_vllm.policies.vote`).

A slot's words are its signature, packed numbers (`hashevict_vllm.policies.frame`) and
its votes, which are float32 but for their lowest bits
(`hashevict_vllm.kernels.triton.octave`). How an attention logit is guessed from them is
`estimated_logits`. A ballot touches the tail of the layer's pages and its own scratch,
and reads keys; attention reads keys and values. So both may run at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels.codes import UNDESCRIBED
from hashevict_vllm.kernels.triton.describe import write_descriptions
from hashevict_vllm.kernels.triton.frame import FRAME_VECTORS, write_frame
from hashevict_vllm.kernels.triton.octave import size_of, votes_of, with_octave
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

_UNDESCRIBED = tl.constexpr(UNDESCRIBED)
_AT_ONCE = tl.constexpr(16)
"""Slots described at a time."""


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
def finite_logits(logits, asked):
    """Logits [G', n], -inf where a slot is not asked about or has no finite one."""
    known = asked & (tl.abs(logits) < float("inf"))
    return tl.where(known, logits, float("-inf"))


@triton.jit
def _describe_new(
    at,
    live,
    found,
    frame,
    projection,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Describe those of the first ``live`` slots that are not. Ends with a barrier.

    Args:
        at: `Head`.
        live: int32.
        found: int32 pointer [C], scratch of this program.
        frame: float64 pointer [3, D], from `write_frame`.
        projection: float32 [D, b], contiguous.
        rule: `DeviceRule`.
        sizes: `Sizes`.
        COLUMNS: See `write_descriptions`.
        STEP: See `write_descriptions`.
        TILE: Slots per step of the search.

    """
    lane = tl.arange(0, TILE)
    count = 0
    for first in range(0, live, TILE):
        slots = first + lane
        used = slots < live
        meta = meta_of(at, slots, used, sizes)
        word = tl.load(meta + (rule.words - 2) * at.page.word, mask=used, other=0)
        new = used & (word == _UNDESCRIBED)
        one = new.to(tl.int32)
        rank = count + tl.cumsum(one, 0) - 1
        tl.store(found + rank, slots, mask=new)
        count += tl.sum(one, 0)
    tl.debug_barrier()
    index = tl.arange(0, _AT_ONCE)
    for first in range(0, count, _AT_ONCE):
        used = first + index < count
        slot = tl.load(found + first + index, mask=used, other=0)
        nothing = tl.zeros([_AT_ONCE], tl.int32)
        write_descriptions(
            at.page,
            at.table + nothing,
            at.index,
            slot,
            used,
            frame + nothing,
            projection,
            rule,
            sizes,
            COLUMNS,
            STEP,
        )
    tl.debug_barrier()


@triton.jit
def _cast_votes(
    at,
    live,
    own,
    projected,
    guessed,
    estimate,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    TILE: tl.constexpr,
):
    """Votes fade, and grow by the most attention that a query of the group pays.

    Two passes over the slots: logits, their largest and sum for every query, and the
    size of all values, which have votes of their own; then the votes.
    Ends with a barrier, so that the program may read what it wrote.

    Args:
        at: `Head`; all its first ``live`` slots are described.
        live: int32.
        own: int32, the voter's position; its slot is not voted on.
        projected: float32 pointer [b + 2, G'], from `project_queries`.
        guessed: float32 pointer [G', C], scratch of this program.
        estimate: `Estimate`.
        rule: `DeviceRule`; the last of a slot's words are the votes.
        sizes: `Sizes`.
        TILE: Slots per step.

    """
    members: tl.constexpr = sizes.members
    lane, member = tl.arange(0, TILE), tl.arange(0, members)
    bits, word = estimate.bits, at.page.word
    top = tl.full([members], float("-inf"), tl.float32)
    total = tl.zeros([members], tl.float32)
    values = tl.zeros([TILE], tl.float32)
    for first in range(0, live, TILE):
        slots = first + lane
        used = slots < live
        meta = meta_of(at, slots, used, sizes)
        position = tl.load(meta + rule.words * word, mask=used, other=0)
        asked = used & (position != own)
        logits = estimated_logits(
            meta, used, projected, member, bits, word, rule, sizes
        )
        logits = finite_logits(logits, asked[None, :])
        row = guessed + member[:, None] * rule.budget + slots[None, :]
        tl.store(row, logits, mask=used[None, :] & (member >= 0)[:, None])
        higher = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # none in a tile
        here = tl.sum(tl.exp(logits - base[:, None]), 1)
        total = total * tl.exp(top - base) + here
        top = higher
        kept = tl.load(meta + (rule.words - 1) * word, mask=used, other=0)
        values += tl.where(asked, size_of(kept), 0.0)
    values = tl.sum(values, 0)
    spread = tl.where(values > 0.0, estimate.value_votes / values, 0.0)
    share = tl.where((member < sizes.group) & (total > 0.0), 1.0 / total, 0.0)
    top = tl.where(total > 0.0, top, 0.0)
    tl.debug_barrier()
    for first in range(0, live, TILE):
        slots = first + lane
        used = slots < live
        meta = meta_of(at, slots, used, sizes)
        position = tl.load(meta + rule.words * word, mask=used, other=0)
        row = guessed + member[:, None] * rule.budget + slots[None, :]
        there = used[None, :] & (member >= 0)[:, None]
        logits = tl.load(row, mask=there, other=float("-inf"))
        attention = tl.exp(logits - top[:, None]) * share[:, None]
        kept = tl.load(meta + (rule.words - 1) * word, mask=used, other=0)
        added = tl.max(attention, 0) + size_of(kept) * spread
        votes = votes_of(kept) * estimate.decay + added
        asked = used & (position != own)
        changed = with_octave(votes, kept)
        tl.store(meta + (rule.words - 1) * word, changed, mask=asked)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["jobs"])
def ballot_kernel(
    tokens,
    step,
    page,
    estimate,
    scratch,
    jobs,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: pieces and KV heads in turn; the voters of one, in order.

    Comes after the round's tokens are written, and before the layer's next are.

    Args:
        tokens: `Tokens`; queries are read.
        step: `Step`; pieces that read a prompt or hold no voter are left out.
        page: `Page`; signatures, numbers and votes are written, keys read.
        estimate: `Estimate`.
        scratch: `Scratch`.
        jobs: Pieces times KV heads.
        rule: `DeviceRule`; nobody votes before its sinks are there.
        sizes: `Sizes`.
        COLUMNS: See `write_descriptions`.
        STEP: Elements of D per step of products.
        TILE: Slots per step.

    """
    program = tl.program_id(0).to(tl.int64)
    projected = scratch.projected + program * ((rule.bits + 2) * sizes.members)
    frame = scratch.frames + program * (FRAME_VECTORS * sizes.dim)
    found = scratch.found + program * rule.budget
    guessed = scratch.guessed + program * (rule.budget * sizes.members)
    for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
        piece = step.pieces + job // step.heads * NUM_COLUMNS
        head = job % step.heads
        count, ballots = tl.load(piece + COUNT), tl.load(piece + BALLOTS)
        first_voter = tl.load(piece + FIRST_VOTER)
        if (ballots > 0) & (first_voter < count):
            evicts = tl.load(piece + EVICT) != 0
            row, slot = tl.load(piece + ROW), tl.load(piece + SLOT)
            start = tl.load(piece + START)
            at = head_of(step, page, piece, head)
            write_frame(frame, at, rule, sizes)
            live = tl.where(evicts, slot, slot + count)
            _describe_new(
                at,
                live,
                found,
                frame,
                estimate.projection,
                rule,
                sizes,
                COLUMNS,
                STEP,
                TILE,
            )
            for i in range(first_voter, count, ballots):
                token = (row + i).to(tl.int64)
                group = token * tokens.q_token + head * sizes.group * tokens.q_head
                project_queries(
                    tokens.q + group,
                    tokens.q_head,
                    frame,
                    projected,
                    estimate,
                    rule,
                    sizes,
                    STEP,
                )
                live = tl.where(evicts, slot, slot + i)
                _cast_votes(
                    at,
                    live,
                    start + i,
                    projected,
                    guessed,
                    estimate,
                    rule,
                    sizes,
                    TILE,
                )
