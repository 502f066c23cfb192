"""What slots are worth to a reduction (`hashevict_vllm.policies.vote.Vote.merit`).

The votes of neighbours are pooled, and values get credit. Slots lie in no order of
position. So votes are spread out by position first, and neighbours are looked up there:
work is linear in slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels.triton.octave import votes_of
from hashevict_vllm.kernels.triton.pieces import COMPACT, COUNT, NUM_COLUMNS, SLOT
from hashevict_vllm.kernels.triton.slots import head_of, meta_of
from hashevict_vllm.kernels.triton.value import average_beside, credit_of


@triton.jit(do_not_specialize=["longest", "width"])
def pool_kernel(
    step,
    page,
    read,
    written,
    longest,
    width,
    unlike,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    STAGE: tl.constexpr,
    BEFORE: tl.constexpr,
    AHEAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: ``TILE`` slots of one piece and KV head, in one of three launches.

    Args:
        step: `Step`; pieces that are not compacted are left out.
        page: `Page`.
        read: float32 [P, Hkv, longest], what the launch before has written; zero where
            no slot has the position. Unread by the first.
        written: Likewise; by the third float32 [P, Hkv, width], by slot.
        longest: Positions, at least of every slot.
        width: Slots.
        unlike: `Unlike`; the second launch averages distances, the third gives credit.
        rule: `DeviceRule`; the last of a slot's words are the votes.
        sizes: `Sizes`.
        STAGE: 0 spreads votes out, 1 averages over neighbours, 2 takes the largest.
        BEFORE: Neighbours are up to so many positions older,
        AHEAD: and up to so many newer.
        TILE: Slots of a program.

    """
    index, head = tl.program_id(0), tl.program_id(1)
    piece = step.pieces + index * NUM_COLUMNS
    end = tl.load(piece + SLOT) + tl.load(piece + COUNT)
    first = tl.program_id(2) * TILE
    if (tl.load(piece + COMPACT) == 0) | (first >= end):
        return
    at = head_of(step, page, piece, head)
    slots = first + tl.arange(0, TILE)
    used = slots < end
    meta = meta_of(at, slots, used, sizes)
    position = tl.load(meta + rule.words * page.word, mask=used, other=0)
    owner = (index * step.heads + head).to(tl.int64)
    row = read + owner * longest
    gathered = tl.zeros([TILE], tl.float32)
    if STAGE == 0:
        votes = tl.load(meta + (rule.words - 1) * page.word, mask=used, other=0)
        gathered = votes_of(votes)
    else:
        for i in tl.static_range(BEFORE + AHEAD + 1):
            near = position + (i - BEFORE)
            there = used & (near >= 0) & (near < longest)
            votes = tl.load(row + near, mask=there, other=0.0)
            if STAGE == 1:
                gathered += votes
            else:
                gathered = tl.maximum(gathered, votes)
    if STAGE == 1:
        gathered = gathered / (BEFORE + AHEAD + 1)
        if unlike.sums is not None:
            average_beside(unlike, owner, longest, width, position, slots, used, rule)
    if STAGE == 2:
        if unlike.sums is not None:
            gathered += credit_of(unlike, owner, width, piece, end, slots, used, rule)
        tl.store(written + owner * width + slots, gathered, mask=used)
    else:
        tl.store(written + owner * longest + position, gathered, mask=used)
