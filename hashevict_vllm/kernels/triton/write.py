"""Evict and write: one launch per layer and round (design 1.2)."""

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
from hashevict_vllm.kernels.triton.score import NORM, VOTE, find_victims
from hashevict_vllm.kernels.triton.slots import head_of, meta_of
from hashevict_vllm.kernels.triton.votes import cast_votes


@triton.jit
def _write_element_row(source, target, scale, sizes: tl.constexpr):
    """Copy one row of D elements, divided by ``scale`` where there is one (fp8)."""
    padded: tl.constexpr = sizes.dim_padded
    d = tl.arange(0, padded)
    x = tl.load(source + d, mask=d < sizes.dim, other=0.0)
    if scale is not None:
        x = x.to(tl.float32) / tl.load(scale)
    tl.store(target + d, x.to(target.dtype.element_ty), mask=d < sizes.dim)


@triton.jit
def _write_words(
    meta, word, signature, square, rule: tl.constexpr, sizes: tl.constexpr
):
    """What a slot keeps of its key (`EvictionRule.words`)."""
    hashed: tl.constexpr = sizes.hashed
    for w in tl.static_range(hashed):
        tl.store(meta + w * word, tl.load(signature + w))
    if rule.kind == NORM:
        tl.store(meta, tl.load(square).to(tl.int32, bitcast=True))


@triton.jit
def write_kernel(
    tokens,
    signed,
    step,
    page,
    estimate,
    projected,
    frames,
    slots,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    SCANS: tl.constexpr,
):
    """One program: one token on one KV head.

    A token of an evicting piece votes (if its rule votes), finds its victim and takes
    its slot; others take the slot that the piece names. Tokens of one request depend on
    each other's slots only where a piece evicts, and such a piece is one token long.

    Args:
        tokens: `Tokens`.
        signed: `Signed`; unread by rules that keep neither signature nor norm.
        step: `Step`.
        page: `Page`.
        estimate: `Estimate`, read by rules that vote.
        projected: float32 [P, Hkv, b + 2, G'], their scratch.
        frames: float64 [P, Hkv, 3, D], likewise.
        slots: int32 [T, Hkv], written by rules that vote: where each token went.
        rule: `DeviceRule`.
        sizes: `Sizes`.
        STEP: See `cast_votes`.
        TILE: Slots per step of the scan.
        SCANS: Whether any piece may evict or vote; False leaves the scan out.

    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    owner = tl.load(step.token_piece + token)
    if owner < 0:
        return
    piece = step.pieces + owner * NUM_COLUMNS
    i = token.to(tl.int32) - tl.load(piece + ROW)
    count = tl.load(piece + COUNT)
    if (i < 0) | (i >= count):
        return  # belongs to another round
    at = head_of(step, page, piece, head)
    slot = tl.load(piece + SLOT) + i
    position = tl.load(piece + START) + i
    first = (token * step.heads + head) * (sizes.group + 1)
    sources = signed.signatures + first * sizes.hashed
    if SCANS:
        if rule.kind == VOTE:
            scratch = owner * step.heads + head
            if (count == 1) & (tl.load(piece + FIRST_VOTER) == 0):
                frame = frames + scratch * (FRAME_VECTORS * sizes.dim)
                write_frame(frame, at, rule, sizes)
                q_row = token * tokens.q_token + head * sizes.group * tokens.q_head
                cast_votes(
                    at,
                    slot,
                    tokens.q + q_row,
                    tokens.q_head,
                    frame,
                    projected + scratch * ((rule.bits + 2) * sizes.members),
                    estimate,
                    tl.load(piece + BALLOTS) > 0,
                    position - rule.every,
                    rule,
                    sizes,
                    STEP,
                    TILE,
                )
        if tl.load(piece + EVICT) != 0:
            best, best_slot = find_victims(
                at, slot, sources, position, rule, sizes, TILE
            )
            slot = tl.max(tl.where(best == tl.max(best, 0), best_slot, -1), 0)
        # What the scan read and wrote may be in the victim's slot.
        tl.debug_barrier()
    block = tl.load(at.table + slot // sizes.block).to(tl.int64)
    offset = slot % sizes.block
    k_target = block * page.k_block + head * page.k_head + offset * page.k_slot
    v_target = block * page.v_block + head * page.v_head + offset * page.v_slot
    k_source = tokens.k + token * tokens.k_token + head * tokens.k_head
    v_source = tokens.v + token * tokens.v_token + head * tokens.v_head
    _write_element_row(k_source, page.k + k_target, page.k_scale, sizes)
    _write_element_row(v_source, page.v + v_target, page.v_scale, sizes)
    meta = meta_of(at, slot, slot >= 0, sizes)
    tl.store(meta + rule.words * page.word, position)
    if rule.kind == VOTE:
        tl.store(slots + token * step.heads + head, slot)  # `describe` goes on there
    else:
        signature = sources + sizes.group * sizes.hashed
        square = signed.squares + first + sizes.group
        _write_words(meta, page.word, signature, square, rule, sizes)
