"""What a slot keeps of its key, for rules that vote (`hashevict_vllm.policies.frame`).

Keys are read where `write` has put them: those of a prompt's first chunk and its sinks
arrive in one launch. Their frames come from `hashevict_vllm.kernels.triton.frame`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels.codes import LONGEST
from hashevict_vllm.kernels.triton.frame import FRAME_VECTORS, key_rows, load_key
from hashevict_vllm.kernels.triton.pieces import (
    COUNT,
    NUM_COLUMNS,
    REQUEST,
    ROW,
    START,
)
from hashevict_vllm.kernels.triton.slots import meta_of

_LONGEST = tl.constexpr(LONGEST)


@triton.jit
def _centred(
    frame,
    k_cache,
    k_scale,
    rows,
    used,
    dims,
    SINKS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Elements float64 [M, n] of keys less their centre, and of the two axes."""
    inside = used[:, None] & (dims < DIM)[None, :]
    x = load_key(k_cache, k_scale, rows[:, None] + dims[None, :], inside)
    one, two = tl.zeros_like(x), tl.zeros_like(x)
    if SINKS > 0:  # else there is no frame
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


@triton.jit(do_not_specialize=["num_tokens", "token_programs"])
def describe_kernel(
    projection,
    frames,
    pieces,
    token_piece,
    slots,
    block_table,
    k_cache,
    k_scale,
    tail,
    num_tokens,
    token_programs,
    num_heads,
    table_stride,
    k_block_stride,
    k_head_stride,
    k_slot_stride,
    block_stride,
    head_stride,
    word_stride,
    SINKS: tl.constexpr,
    WORDS: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    N: tl.constexpr,
):
    """One program: ``TOKENS`` slots of one KV head; its votes start at zero.

    The first ``token_programs`` describe tokens that lie beyond the sinks. Then every
    piece has as many as its sinks need, which describe them if the last one is in it.

    Args:
        projection: float32 [D, b], contiguous.
        frames: float64 [P, Hkv, 3, D], from `frame_kernel`; unread without sinks.
        pieces: int32 [P, columns], see `pieces`.
        token_piece: int32 [T], row of ``pieces`` of each token; -1 for padding.
        slots: int32 [T, Hkv], where `write` has put each token.
        block_table: int32 [R, max blocks].
        k_cache: See `load_key`.
        k_scale: See `load_key`.
        tail: int32, see `meta_of`; signature, numbers and votes are written.
        num_tokens: T.
        token_programs: Programs of the first kind.
        num_heads: Hkv.
        table_stride: Elements between rows of the block table.
        k_block_stride: See `key_rows`.
        k_head_stride: See `key_rows`.
        k_slot_stride: See `key_rows`.
        block_stride: See `meta_of`.
        head_stride: See `meta_of`.
        word_stride: See `meta_of`.
        SINKS: Positions below are the sinks.
        WORDS: Words of the rule per slot: signature, packed numbers, votes.
        DIM: D.
        BITS: b.
        COLUMNS: The power of two from b on, at least 32.
        TOKENS: Slots of a program, a power of two.
        STEP: Elements of D per step of the product.
        N: Slots of a block.

    """
    program, head = tl.program_id(0), tl.program_id(1)
    index = tl.arange(0, TOKENS)
    if program < token_programs:
        row = program * TOKENS + index
        owner = tl.load(token_piece + row, mask=row < num_tokens, other=-1)
        used = owner >= 0
        piece = pieces + owner * NUM_COLUMNS
        i = row - tl.load(piece + ROW, mask=used, other=0)
        used = used & (i >= 0) & (i < tl.load(piece + COUNT, mask=used, other=0))
        position = i + tl.load(piece + START, mask=used, other=0)
        used = used & (position >= SINKS)
        slot = tl.load(slots + row * num_heads + head, mask=used, other=0)
    else:
        tiles: tl.constexpr = max((SINKS + TOKENS - 1) // TOKENS, 1)
        program -= token_programs
        owner = tl.zeros([TOKENS], tl.int32) + program // tiles
        piece = pieces + owner * NUM_COLUMNS
        start, count = tl.load(piece + START), tl.load(piece + COUNT)
        arrives = (start < SINKS) & (start + count >= SINKS)
        slot = program % tiles * TOKENS + index
        used = arrives & (slot < SINKS)
    if tl.max(used.to(tl.int32), 0) == 0:
        return
    request = tl.load(pieces + owner * NUM_COLUMNS + REQUEST, mask=used, other=0)
    table = block_table + request.to(tl.int64) * table_stride
    rows = key_rows(
        table, slot, used, head, k_block_stride, k_head_stride, k_slot_stride, N
    )
    frame = frames + (owner * num_heads + head) * (FRAME_VECTORS * DIM)
    along_one = tl.zeros([TOKENS], tl.float64)
    along_two = tl.zeros([TOKENS], tl.float64)
    for first in range(0, DIM, STEP):
        x, one, two = _centred(
            frame,
            k_cache,
            k_scale,
            rows,
            used,
            first + tl.arange(0, STEP),
            SINKS,
            DIM,
        )
        along_one += tl.sum(x * one, 1)
        along_two += tl.sum(x * two, 1)
    column = tl.arange(0, COLUMNS)
    dots = tl.zeros([TOKENS, COLUMNS], tl.float32)
    square = tl.zeros([TOKENS], tl.float64)
    for first in range(0, DIM, STEP):
        dims = first + tl.arange(0, STEP)
        x, one, two = _centred(frame, k_cache, k_scale, rows, used, dims, SINKS, DIM)
        rest = x - (along_one[:, None] * one + along_two[:, None] * two)
        square += tl.sum(rest * rest, 1)
        r = tl.load(
            projection + dims[:, None] * BITS + column[None, :],
            mask=(dims < DIM)[:, None] & (column < BITS)[None, :],
            other=0.0,
        )
        dots = tl.dot(rest.to(tl.float32), r, dots, input_precision="ieee")
    numbers, is_short = pack_numbers(along_one, along_two, tl.sqrt(square))
    # A rest that rounds to nothing is rounding noise; every bit of 0 is set.
    is_set = ((dots >= 0) | is_short[:, None]) & (column < BITS)[None, :]
    ones = is_set.to(tl.int32) << (column % 32)
    words = tl.sum(tl.reshape(ones, (TOKENS, COLUMNS // 32, 32)), 2)
    meta = meta_of(tail, table, slot, used, head, block_stride, head_stride, N)
    w = tl.arange(0, COLUMNS // 32)
    tl.store(
        meta[:, None] + w[None, :] * word_stride,
        words,
        mask=used[:, None] & (w < WORDS - 2)[None, :],
    )
    tl.store(meta + (WORDS - 2) * word_stride, numbers, mask=used)
    tl.store(meta + (WORDS - 1) * word_stride, tl.zeros([TOKENS], tl.int32), mask=used)
