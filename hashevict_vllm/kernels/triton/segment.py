"""Votes of the last queries of a prompt's segment (`hashevict_vllm.policies.vote`).

Every query is asked about every slot, as two matrix products of queries and signs. Four
launches, so that all multiprocessors take part and every sum has a fixed order: what
of the queries meets slots; largest logit and sum of every tile of slots; those of all
tiles; the votes. Neither order nor tiles depend on how a scheduler cuts the prompt.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels.triton.frame import FRAME_VECTORS
from hashevict_vllm.kernels.triton.octave import votes_of, with_octave
from hashevict_vllm.kernels.triton.pieces import (
    BALLOTS,
    COUNT,
    FIRST_VOTER,
    NUM_COLUMNS,
    ROW,
    SLOT,
)
from hashevict_vllm.kernels.triton.queries import project_queries
from hashevict_vllm.kernels.triton.slots import head_of, meta_of
from hashevict_vllm.kernels.triton.votes import finite_logits


@triton.jit
def _voters_of(piece):
    """A piece's first voter and their number, int32; none where tokens decode."""
    first = tl.load(piece + FIRST_VOTER)
    number = tl.load(piece + COUNT) - first
    return first, tl.where(tl.load(piece + BALLOTS) == 0, number, 0)


@triton.jit
def ask_kernel(
    tokens,
    step,
    estimate,
    asked,
    frames,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program: the queries of one voter and KV head.

    Args:
        tokens: `Tokens`.
        step: `Step`.
        estimate: `Estimate`.
        asked: `Asked`; ``projected`` is written.
        frames: float64 [P, Hkv, 3, D], from `frame_kernel`.
        rule: `DeviceRule`.
        sizes: `Sizes`.
        STEP: See `project_queries`.

    """
    voter, index, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    piece = step.pieces + index * NUM_COLUMNS
    first, number = _voters_of(piece)
    if voter >= number:
        return
    token = (tl.load(piece + ROW) + first + voter).to(tl.int64)
    owner = (index * step.heads + head).to(tl.int64)
    project_queries(
        tokens.q + token * tokens.q_token + head * sizes.group * tokens.q_head,
        tokens.q_head,
        frames + owner * (FRAME_VECTORS * sizes.dim),
        asked.projected
        + (owner * rule.window + voter) * ((rule.bits + 2) * sizes.members),
        estimate,
        rule,
        sizes,
        STEP,
    )


@triton.jit
def _logits(
    projected,
    meta,
    used,
    voter,
    member,
    number,
    word_stride,
    rule: tl.constexpr,
    sizes: tl.constexpr,
):
    """Logits float32 [M, n] of queries (`voter`, `member`: int32 [M]) and slots [n]."""
    members: tl.constexpr = sizes.members
    hashed: tl.constexpr = sizes.hashed
    rows: tl.constexpr = voter.shape[0]
    row = projected + voter * ((rule.bits + 2) * members) + member
    there = voter < number
    bit = tl.arange(0, 32)
    total = tl.zeros([rows, used.shape[0]], tl.float32)
    for w in tl.static_range(hashed):
        column = w * 32 + bit
        t = tl.load(
            row[:, None] + (column * members)[None, :],
            mask=there[:, None] & (column < rule.bits)[None, :],
            other=0.0,
        )
        word = tl.load(meta + w * word_stride, mask=used, other=0)
        signs = ((word[None, :] >> bit[:, None]) & 1).to(tl.float32) * 2.0 - 1.0
        total = tl.dot(t, signs, total, input_precision="ieee")
    numbers = tl.load(meta + hashed * word_stride, mask=used, other=0)
    total *= (numbers >> 16 & 255).to(tl.float32)[None, :]
    for axis in tl.static_range(2):  # two signed bytes, the lower first
        along = (numbers << (24 - 8 * axis) >> 24).to(tl.float32)
        t = tl.load(row + (rule.bits + axis) * members, mask=there, other=0.0)
        total += t[:, None] * along[None, :]
    step = ((numbers >> 24 & 255) << 23).to(tl.float32, bitcast=True)
    return total * step[None, :]


@triton.jit(do_not_specialize=["tiles"])
def tops_kernel(
    step,
    page,
    asked,
    tiles,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: largest logit of all queries in one tile of slots, and the sum.

    Args:
        step: `Step`.
        page: `Page`.
        asked: `Asked`; ``tops`` and ``sums`` are written.
        tiles: Tiles that ``asked`` has room for.
        rule: `DeviceRule`.
        sizes: `Sizes`.
        ROWS: Queries at a time, a multiple of G'.
        TILE: Slots of a program.

    """
    tile, index, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    piece = step.pieces + index * NUM_COLUMNS
    first, number = _voters_of(piece)
    earlier = tl.load(piece + SLOT) + first  # slots that the first voter finds
    slots = tile * TILE + tl.arange(0, TILE)
    if (number <= 0) | (tile * TILE >= earlier + number - 1):
        return
    members: tl.constexpr = sizes.members
    owner = (index * step.heads + head).to(tl.int64)
    at = head_of(step, page, piece, head)
    used = slots < earlier + number - 1
    meta = meta_of(at, slots, used, sizes)
    projected = asked.projected + owner * (
        rule.window * (rule.bits + 2) * sizes.members
    )
    line = tl.arange(0, ROWS)
    for begin in range(0, number, ROWS // members):
        voter, member = begin + line // members, line % members
        logits = _logits(
            projected, meta, used, voter, member, number, page.word, rule, sizes
        )
        # Else the signs of all words are kept in registers, which are too few.
        tl.debug_barrier()
        before = slots[None, :] < earlier + voter[:, None]
        logits = finite_logits(logits, before)
        top = tl.max(logits, 1)
        base = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp(logits - base[:, None]), 1)
        out = (owner * (rule.window * members) + voter * members + member) * tiles
        tl.store(asked.tops + out + tile, top, mask=voter < number)
        tl.store(asked.sums + out + tile, total, mask=voter < number)


@triton.jit(do_not_specialize=["tiles"])
def totals_kernel(
    step,
    asked,
    tiles,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: largest logit of one query over all slots, and its sum's inverse.

    Args:
        step: `Step`.
        asked: `Asked`; ``totals`` is written.
        tiles: See `tops_kernel`.
        rule: `DeviceRule`.
        sizes: `Sizes`.
        SLOTS: ``TILE`` of `tops_kernel`.
        TILE: Tiles per step.

    """
    query, index, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    piece = step.pieces + index * NUM_COLUMNS
    first, number = _voters_of(piece)
    members: tl.constexpr = sizes.members
    if query // members >= number:
        return
    end = tl.load(piece + SLOT) + first + number - 1
    owner = (index * step.heads + head).to(tl.int64)
    row = owner * (rule.window * members) + query
    lane = tl.arange(0, TILE)
    written = (end + SLOTS - 1) // SLOTS
    best = tl.full([TILE], float("-inf"), tl.float32)
    for begin in range(0, written, TILE):
        tile = begin + lane
        top = tl.load(
            asked.tops + row * tiles + tile, mask=tile < written, other=float("-inf")
        )
        best = tl.maximum(best, top)
    highest = tl.max(best, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)  # no finite logit
    total = tl.zeros([TILE], tl.float32)
    for begin in range(0, written, TILE):
        tile = begin + lane
        used = tile < written
        top = tl.load(asked.tops + row * tiles + tile, mask=used, other=float("-inf"))
        here = tl.load(asked.sums + row * tiles + tile, mask=used, other=0.0)
        total += here * tl.exp(top - highest)
    whole = tl.sum(total, 0)
    known = (query % members < sizes.group) & (whole > 0.0)
    share = tl.where(known, 1.0 / whole, 0.0)
    tl.store(asked.totals + row * 2, highest)
    tl.store(asked.totals + row * 2 + 1, share)


@triton.jit
def add_kernel(
    step,
    page,
    asked,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: one tile of slots gains the votes of all voters, one by one.

    Args:
        step: `Step`.
        page: `Page`; votes are written.
        asked: `Asked`.
        rule: `DeviceRule`; the last of a slot's words are the votes.
        sizes: `Sizes`.
        ROWS: See `tops_kernel`.
        TILE: Slots of a program.

    """
    tile, index, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    piece = step.pieces + index * NUM_COLUMNS
    first, number = _voters_of(piece)
    earlier = tl.load(piece + SLOT) + first
    slots = tile * TILE + tl.arange(0, TILE)
    if (number <= 0) | (tile * TILE >= earlier + number - 1):
        return
    members: tl.constexpr = sizes.members
    at_once: tl.constexpr = ROWS // members
    owner = (index * step.heads + head).to(tl.int64)
    at = head_of(step, page, piece, head)
    used = slots < earlier + number - 1
    meta = meta_of(at, slots, used, sizes)
    projected = asked.projected + owner * (rule.window * (rule.bits + 2) * members)
    totals = asked.totals + owner * (rule.window * members * 2)
    kept = meta + (rule.words - 1) * page.word
    word = tl.load(kept, mask=used, other=0)
    line, within = tl.arange(0, ROWS), tl.arange(0, at_once)
    for begin in range(0, number, at_once):
        voter, member = begin + line // members, line % members
        logits = _logits(
            projected, meta, used, voter, member, number, page.word, rule, sizes
        )
        there = voter < number
        total = totals + (voter * members + member) * 2
        top = tl.load(total, mask=there, other=0.0)
        share = tl.load(total + 1, mask=there, other=0.0)
        before = slots[None, :] < earlier + voter[:, None]
        attention = tl.exp(finite_logits(logits, before) - top[:, None])
        attention = tl.reshape(attention * share[:, None], (at_once, members, TILE))
        most = tl.max(attention, 1)
        for i in tl.static_range(at_once):
            votes = tl.sum(tl.where((within == i)[:, None], most, 0.0), 0)
            word = with_octave(votes_of(word) + votes, word)
    tl.store(kept, word, mask=used)
