"""What a slot keeps of its key, for rules that vote (`hashevict_vllm.policies.frame`).

A prompt's keys are described once they are written (`describe_kernel`), those of tokens
that decode by the first ballot that meets them (`hashevict_vllm.kernels.triton.votes`).
They are read where `write` has put them: those of a prompt's first chunk and its sinks
arrive in one launch. Frames come from `hashevict_vllm.kernels.triton.frame`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels.codes import LONGEST
from hashevict_vllm.kernels.triton.arguments import Head
from hashevict_vllm.kernels.triton.frame import FRAME_VECTORS, load_key
from hashevict_vllm.kernels.triton.pieces import (
    COUNT,
    EVICT,
    NUM_COLUMNS,
    REQUEST,
    ROW,
    SLOT,
    START,
)
from hashevict_vllm.kernels.triton.slots import key_rows, meta_of

_LONGEST = tl.constexpr(LONGEST)


@triton.jit
def _centred(page, frame, rows, used, dims, rule: tl.constexpr, DIM: tl.constexpr):
    """Elements float64 [M, n] of keys less their centre, and of the two axes."""
    inside = used[:, None] & (dims < DIM)[None, :]
    x = load_key(page, rows[:, None] + dims[None, :], inside)
    one, two = tl.zeros_like(x), tl.zeros_like(x)
    if rule.sinks > 0:  # else there is no frame
        vector = frame[:, None] + dims[None, :]
        x -= tl.load(vector, mask=inside, other=0.0)
        one = tl.load(vector + DIM, mask=inside, other=0.0)
        two = tl.load(vector + 2 * DIM, mask=inside, other=0.0)
    return x, one, two


@triton.jit
def pack_numbers(one, two, length):
    """A key's coordinates and the length of its rest as `Described.words` packs them.

    Args:
        one: float64 [M], coordinate along the first axis.
        two: float64 [M], along the second.
        length: float64 [M], of the rest.

    Returns:
        int32 [M], the packed numbers, and bool [M], whether the length rounds to 0.

    """
    finite = (tl.abs(one) <= _LONGEST) & (tl.abs(two) <= _LONGEST)
    finite = finite & (length <= _LONGEST)
    one, two = tl.where(finite, one, 0.0), tl.where(finite, two, 0.0)
    length = tl.where(finite, length, 0.0)
    largest = tl.maximum(tl.maximum(tl.abs(one), tl.abs(two)), length)
    # The largest of the three lies between 64 and 128 steps.
    exponent = (largest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 6
    exponent = tl.maximum(exponent, 0)
    step = (exponent << 23).to(tl.float32, bitcast=True).to(tl.float64)
    safe = tl.where(exponent > 0, step, 1.0)
    one = tl.floor(one / safe + 0.5).to(tl.int32)
    two = tl.floor(two / safe + 0.5).to(tl.int32)
    length = tl.floor(length / safe + 0.5).to(tl.int32)
    one = tl.minimum(tl.maximum(one, -127), 127) & 255
    two = tl.minimum(tl.maximum(two, -127), 127) & 255
    word = one | two << 8 | length << 16 | exponent << 24
    word = tl.where(exponent > 0, word, 0)
    return word, (word >> 16 & 255) == 0


@triton.jit
def write_descriptions(
    page,
    table,
    head,
    slot,
    used,
    frame,
    projection,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Signature and numbers of the keys in some slots.

    Args:
        page: `Page`.
        table: int32 pointers [M] to the block numbers of each slot's request.
        head: KV head.
        slot: int32 [M], slots.
        used: bool [M]; the others are left alone.
        frame: float64 pointers [M] to the frame of each slot's request, [3, D].
        projection: float32 [D, b], contiguous.
        rule: `DeviceRule`.
        sizes: `Sizes`.
        COLUMNS: The power of two from b on, at least 32.
        STEP: Elements of D per step of the product.

    """
    count: tl.constexpr = slot.shape[0]
    dim: tl.constexpr = sizes.dim
    rows = key_rows(page, table, head, slot, used, sizes)
    along_one = tl.zeros([count], tl.float64)
    along_two = tl.zeros([count], tl.float64)
    for first in range(0, dim, STEP):
        dims = first + tl.arange(0, STEP)
        x, one, two = _centred(page, frame, rows, used, dims, rule, dim)
        along_one += tl.sum(x * one, 1)
        along_two += tl.sum(x * two, 1)
    column = tl.arange(0, COLUMNS)
    dots = tl.zeros([count, COLUMNS], tl.float32)
    square = tl.zeros([count], tl.float64)
    for first in range(0, dim, STEP):
        dims = first + tl.arange(0, STEP)
        x, one, two = _centred(page, frame, rows, used, dims, rule, dim)
        rest = x - (along_one[:, None] * one + along_two[:, None] * two)
        square += tl.sum(rest * rest, 1)
        r = tl.load(
            projection + dims[:, None] * rule.bits + column[None, :],
            mask=(dims < dim)[:, None] & (column < rule.bits)[None, :],
            other=0.0,
        )
        dots = tl.dot(rest.to(tl.float32), r, dots, input_precision="ieee")
    numbers, is_short = pack_numbers(along_one, along_two, tl.sqrt(square))
    # A rest that rounds to nothing is rounding noise; every bit of 0 is set.
    is_set = ((dots >= 0) | is_short[:, None]) & (column < rule.bits)[None, :]
    ones = is_set.to(tl.int32) << (column % 32)
    words = tl.sum(tl.reshape(ones, (count, COLUMNS // 32, 32)), 2)
    meta = meta_of(Head(page, table, head), slot, used, sizes)
    w = tl.arange(0, COLUMNS // 32)
    tl.store(
        meta[:, None] + w[None, :] * page.word,
        words,
        mask=used[:, None] & (w < sizes.hashed)[None, :],
    )
    tl.store(meta + sizes.hashed * page.word, numbers, mask=used)


@triton.jit(do_not_specialize=["num_tokens", "token_programs"])
def describe_kernel(
    step,
    page,
    projection,
    frames,
    num_tokens,
    token_programs,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program: ``TOKENS`` slots of one KV head.

    Tokens that evict are left to ballots. The first ``token_programs`` describe tokens
    that lie beyond the sinks. Then every piece has as many as its sinks need, which
    describe them if the last one is in it.

    Args:
        step: `Step`.
        page: `Page`.
        projection: float32 [D, b], contiguous.
        frames: float64 [P, Hkv, 3, D], from `frame_kernel`; unread without sinks.
        num_tokens: T.
        token_programs: Programs of the first kind.
        rule: `DeviceRule`.
        sizes: `Sizes`.
        COLUMNS: See `write_descriptions`.
        TOKENS: Slots of a program, a power of two.
        STEP: See `write_descriptions`.

    """
    program, head = tl.program_id(0), tl.program_id(1)
    index = tl.arange(0, TOKENS)
    if program < token_programs:
        row = program * TOKENS + index
        owner = tl.load(step.token_piece + row, mask=row < num_tokens, other=-1)
        used = owner >= 0
        piece = step.pieces + owner * NUM_COLUMNS
        i = row - tl.load(piece + ROW, mask=used, other=0)
        used = used & (i >= 0) & (i < tl.load(piece + COUNT, mask=used, other=0))
        position = i + tl.load(piece + START, mask=used, other=0)
        used = used & (position >= rule.sinks)
        used = used & (tl.load(piece + EVICT, mask=used, other=1) == 0)
        slot = i + tl.load(piece + SLOT, mask=used, other=0)
    else:
        tiles: tl.constexpr = max((rule.sinks + TOKENS - 1) // TOKENS, 1)
        program -= token_programs
        owner = tl.zeros([TOKENS], tl.int32) + program // tiles
        piece = step.pieces + owner * NUM_COLUMNS
        start, count = tl.load(piece + START), tl.load(piece + COUNT)
        arrives = (start < rule.sinks) & (start + count >= rule.sinks)
        slot = program % tiles * TOKENS + index
        used = arrives & (slot < rule.sinks)
    if tl.max(used.to(tl.int32), 0) == 0:
        return
    piece = step.pieces + owner * NUM_COLUMNS
    request = tl.load(piece + REQUEST, mask=used, other=0)
    write_descriptions(
        page,
        step.table + request.to(tl.int64) * step.row,
        head,
        slot,
        used,
        frames + (owner * step.heads + head) * (FRAME_VECTORS * sizes.dim),
        projection,
        rule,
        sizes,
        COLUMNS,
        STEP,
    )
