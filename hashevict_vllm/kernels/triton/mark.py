"""Marks the losers of a segment ``~position`` (design 1.3), before it is compacted.

Rules of one step replay the decode rule token by token (`replay_kernel`), unless who
loses can be told at once: with votes, by age, by norm (`select_kernel`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels.codes import NEIGHBOURS, RECENT_IN_SELECTION
from hashevict_vllm.kernels.triton.octave import votes_of, with_octave
from hashevict_vllm.kernels.triton.pieces import (
    BUDGET,
    COMPACT,
    COUNT,
    EVICT,
    NUM_COLUMNS,
    RECENT,
    ROW,
    SLOT,
    START,
)
from hashevict_vllm.kernels.triton.score import (
    NORM,
    RECENCY,
    VOTE,
    find_victims,
    position_of,
)
from hashevict_vllm.kernels.triton.slots import head_of, meta_of

_NEIGHBOURS = tl.constexpr(NEIGHBOURS)
_RECENT_IN_SELECTION = tl.constexpr(RECENT_IN_SELECTION)
_NEVER = tl.constexpr(2**63 - 1)
_INT32_MAX = tl.constexpr(2**31 - 1)
_DIGIT = tl.constexpr(8)
"""Bits of a threshold that are found at a time."""

_BINS = tl.constexpr(256)


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
    recent = tl.load(piece + RECENT)
    for i in range(tl.maximum(tl.load(piece + BUDGET) - slot, 0), count):
        token = ((row + i).to(tl.int64) * step.heads + head) * (sizes.group + 1)
        sources = signed.signatures + token * sizes.hashed
        best, best_slot = find_victims(
            at, slot + i, sources, start + i, recent, rule, sizes, TILE, False
        )
        found = (best == tl.max(best, 0)) & (best >= 0)
        meta = meta_of(at, best_slot, found, sizes)
        tl.store(meta + rule.words * page.word, ~position_of(best), mask=found)
        tl.debug_barrier()  # the next token's scan sees the mark


@triton.jit
def _selection_order(
    at, merit, row, slots, used, stop, rule: tl.constexpr, sizes: tl.constexpr
):
    """An int64 [n] that orders losers, protected slots last; and positions [n]."""
    meta = meta_of(at, slots, used, sizes)
    position = tl.load(meta + rule.words * at.page.word, mask=used, other=-1)
    order = position.to(tl.int64)
    if rule.kind == VOTE:
        votes = tl.load(merit + row + slots, mask=used, other=0.0)
        order |= votes.to(tl.int32, bitcast=True).to(tl.int64) << 32
    elif rule.kind == NORM:
        square = tl.load(meta, mask=used, other=0)  # bits order as the float does
        order |= (square ^ _INT32_MAX).to(tl.int64) << 32
    else:
        tl.static_assert(rule.kind == RECENCY, "must be replayed")
    free = used & (position >= rule.sinks) & (position < stop)
    return tl.where(free, order, _NEVER), meta, position


@triton.jit
def _keep_votes(meta, merit, used, word, rule: tl.constexpr):
    """A slot's own votes, but at least a share of its merit."""
    kept = meta + (rule.words - 1) * word
    own = tl.load(kept, mask=used, other=0)
    least = tl.load(merit, mask=used, other=0.0) * _NEIGHBOURS
    votes = tl.maximum(votes_of(own), least)
    tl.store(kept, with_octave(votes, own), mask=used)


@triton.jit(do_not_specialize=["width"])
def select_kernel(
    step,
    page,
    merit,
    width,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: the losers of one piece and KV head are marked, all at once.

    With votes, when a segment is complete: all but C slots, of the least merit
    first. Else as many as tokens lie beyond the budget: the oldest, or the largest
    norms. (Token by token, every step would add one candidate and take out the worst,
    so that in the end the best of all candidates are left, as many as there were.) Of
    equal slots the oldest lose. The threshold is found digit by digit: it is the
    largest number below which no more slots lie than must go, and as no two slots are
    equal, exactly as many do.

    Args:
        step: `Step`.
        page: `Page`; positions are marked, votes kept as `_keep_votes` says.
        merit: float32 [P, Hkv, width], from `pool_kernel`; unread without votes.
        width: Slots per row of ``merit``.
        rule: `DeviceRule`.
        sizes: `Sizes`.
        TILE: Slots per step.

    """
    index, head = tl.program_id(0), tl.program_id(1)
    piece = step.pieces + index * NUM_COLUMNS
    count, slot = tl.load(piece + COUNT), tl.load(piece + SLOT)
    end = slot + count
    # Tokens are protected from their own recent past; votes come after the last one.
    recent, stop = tl.load(piece + RECENT), tl.load(piece + START) + count
    budget = tl.load(piece + BUDGET)
    if rule.kind == VOTE:
        stop -= tl.minimum(recent, _RECENT_IN_SELECTION)
        excess = tl.where(tl.load(piece + COMPACT) != 0, end - budget, 0)
    else:
        stop -= recent + 1
        excess = count - tl.maximum(budget - slot, 0)
        excess = tl.where(tl.load(piece + EVICT) == 0, excess, 0)
    if excess <= 0:
        return
    at = head_of(step, page, piece, head)
    row = (index * step.heads + head).to(tl.int64) * width
    lane, digits = tl.arange(0, TILE), tl.arange(0, _BINS)
    threshold = tl.zeros([], tl.int64)
    left = excess
    for done in range(64 // _DIGIT):
        shift = 64 - _DIGIT - _DIGIT * done
        counts = tl.zeros([_BINS], tl.int32)
        for first in range(0, end, TILE):
            slots = first + lane
            used = slots < end
            order, _, _ = _selection_order(
                at, merit, row, slots, used, stop, rule, sizes
            )
            digit = order >> shift
            here = used & ((digit >> _DIGIT) == threshold)
            digit = (digit & (_BINS - 1)).to(tl.int32)
            counts += tl.histogram(digit, _BINS, mask=here)
        before = tl.cumsum(counts, 0) - counts
        chosen = tl.sum((before <= left).to(tl.int32), 0) - 1
        left -= tl.sum(tl.where(digits == chosen, before, 0), 0)
        threshold = (threshold << _DIGIT) | chosen
    for first in range(0, end, TILE):
        slots = first + lane
        used = slots < end
        order, meta, position = _selection_order(
            at, merit, row, slots, used, stop, rule, sizes
        )
        if rule.kind == VOTE:
            _keep_votes(meta, merit + row + slots, used, page.word, rule)
        loses = used & (order < threshold)
        tl.store(meta + rule.words * page.word, ~position, mask=loses)
