"""Evict and write: the one launch of a layer that attention waits for (design 1.2)."""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels.codes import NOT_A_NUMBER, UNDESCRIBED
from hashevict_vllm.kernels.triton.octave import octave_of
from hashevict_vllm.kernels.triton.pieces import (
    COUNT,
    EVICT,
    FIRST_VOTER,
    NUM_COLUMNS,
    RECENT,
    ROW,
    SLOT,
    START,
)
from hashevict_vllm.kernels.triton.score import NORM, VOTE, find_victims
from hashevict_vllm.kernels.triton.slots import head_of, meta_of

_UNDESCRIBED = tl.constexpr(UNDESCRIBED)
_NOT_A_NUMBER = tl.constexpr(NOT_A_NUMBER)


@triton.jit
def _write_element_row(source, target, scale, sizes: tl.constexpr):
    """Copy one row of D elements, divided by ``scale`` where there is one (fp8).

    Returns:
        What was written, float32 [D'], 0 beyond D; times ``scale``.

    """
    padded: tl.constexpr = sizes.dim_padded
    d = tl.arange(0, padded)
    x = tl.load(source + d, mask=d < sizes.dim, other=0.0)
    if scale is not None:
        x = x.to(tl.float32) / tl.load(scale)
    written = x.to(target.dtype.element_ty)
    tl.store(target + d, written, mask=d < sizes.dim)
    written = written.to(tl.float32)
    if scale is not None:
        written *= tl.load(scale)
    return written


@triton.jit
def _write_words(
    meta, word, signed, token_head, value, rule: tl.constexpr, sizes: tl.constexpr
):
    """What a slot keeps (`EvictionRule.words`), as far as it is known.

    With votes a ballot describes the key; nobody has voted on it. ``value`` float32
    [D'], see `octave_of`.
    """
    if rule.kind == VOTE:
        tl.store(meta + (rule.words - 2) * word, _UNDESCRIBED)
        tl.store(meta + (rule.words - 1) * word, octave_of(value))
    else:
        hashed: tl.constexpr = sizes.hashed
        row = token_head * (sizes.group + 1) + sizes.group
        for w in tl.static_range(hashed):
            signature = tl.load(signed.signatures + row * hashed + w)
            tl.store(meta + w * word, signature)
        if rule.kind == NORM:
            square = tl.load(signed.squares + row)
            bits = square.to(tl.int32, bitcast=True)
            tl.store(meta, tl.where(square == square, bits, _NOT_A_NUMBER))


@triton.jit
def _keep_queries(tokens, token, head, queries, num_heads, sizes: tl.constexpr):
    """Copy a voter's queries, which a ballot reads when the model may have gone on."""
    members: tl.constexpr = sizes.members
    padded: tl.constexpr = sizes.dim_padded
    g, d = tl.arange(0, members)[:, None], tl.arange(0, padded)[None, :]
    inside = (g < sizes.group) & (d < sizes.dim)
    source = tokens.q + token * tokens.q_token + head * sizes.group * tokens.q_head
    x = tl.load(source + g * tokens.q_head + d, mask=inside, other=0.0)
    target = queries + (token * num_heads + head) * (sizes.group * sizes.dim)
    tl.store(target + g * sizes.dim + d, x, mask=inside)


@triton.jit
def write_kernel(
    tokens,
    signed,
    step,
    page,
    rows,
    queries,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    TILE: tl.constexpr,
    SCANS: tl.constexpr,
):
    """One program: one token on one KV head.

    A token of an evicting piece finds its victim and takes its slot; others take the
    slot that the piece names. Tokens of one request depend on each other's slots only
    where a piece evicts, and such a piece is one token long.

    Args:
        tokens: `Tokens`.
        signed: `Signed`; unread by rules that keep neither signature nor norm.
        step: `Step`; where it has no ``token_piece``, as in decode, programs are pieces
            of one token, and one load fewer stands before the scan.
        page: `Page`, written.
        rows: int32 [n], tokens that are written, one per program; None for all.
        queries: [T, Hq, D], written for tokens that vote; None where nobody asks.
        rule: `DeviceRule`.
        sizes: `Sizes`.
        TILE: Slots per step of the scan.
        SCANS: Whether tokens may evict. If not, those that do are left alone: they
            have a launch of their own.

    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    owner = tl.program_id(0)
    if step.token_piece is not None:
        if rows is not None:
            token = tl.load(rows + token).to(tl.int64)
        owner = tl.load(step.token_piece + token)
        if owner < 0:
            return
    piece = step.pieces + owner * NUM_COLUMNS
    row = tl.load(piece + ROW)
    if step.token_piece is None:
        token = row.to(tl.int64)
    i = token.to(tl.int32) - row
    if (i < 0) | (i >= tl.load(piece + COUNT)):
        return  # belongs to another round
    evicts = tl.load(piece + EVICT) != 0
    at = head_of(step, page, piece, head)
    slot = tl.load(piece + SLOT) + i
    position = tl.load(piece + START) + i
    token_head = token * step.heads + head
    if SCANS:
        if queries is not None:  # noqa: SIM102 (a constant, unlike the next)
            if tl.load(piece + FIRST_VOTER) == 0:
                _keep_queries(tokens, token, head, queries, step.heads, sizes)
        if evicts:
            first = token_head * (sizes.group + 1)
            sources = signed.signatures + first * sizes.hashed
            recent = tl.load(piece + RECENT)
            once: tl.constexpr = rule.budget <= TILE
            best, best_slot = find_victims(
                at, slot, sources, position, recent, rule, sizes, TILE, once
            )
            slot = tl.max(tl.where(best == tl.max(best, 0), best_slot, -1), 0)
        # What the scan read may be in the victim's slot.
        tl.debug_barrier()
    else:
        if evicts:
            return
    block = tl.load(at.table + slot // sizes.block).to(tl.int64)
    offset = slot % sizes.block
    k_target = block * page.k_block + head * page.k_head + offset * page.k_slot
    v_target = block * page.v_block + head * page.v_head + offset * page.v_slot
    k_source = tokens.k + token * tokens.k_token + head * tokens.k_head
    v_source = tokens.v + token * tokens.v_token + head * tokens.v_head
    _write_element_row(k_source, page.k + k_target, page.k_scale, sizes)
    value = _write_element_row(v_source, page.v + v_target, page.v_scale, sizes)
    meta = meta_of(at, slot, slot >= 0, sizes)
    tl.store(meta + rule.words * page.word, position)
    _write_words(meta, page.word, signed, token_head, value, rule, sizes)
