"""Where a slot lies in the pages, and how it is read and written (numba).

``blocks`` int32 [..] are the block numbers of a request throughout.
"""

from __future__ import annotations

import numpy as np

from hashevict_vllm.kernels.codes import BFLOAT16, FLOAT16
from hashevict_vllm.kernels.cpu.jit import inlined
from hashevict_vllm.kernels.cpu.views import prefetch

FP16_REBIAS = np.float32(2.0**112)
"""Factor on a float16's bits, read as those of a float32."""


@inlined
def load(raw, kind, out):
    """Read a row of D raw elements as float32 into ``out`` [D], which they may be."""
    bits = out.view(np.uint32)
    if kind == BFLOAT16:
        for d in range(len(raw)):
            bits[d] = np.uint32(raw[d]) << np.uint32(16)
    elif kind == FLOAT16:
        for d in range(len(raw)):
            x = np.uint32(raw[d])
            sign = (x & np.uint32(0x8000)) << np.uint32(16)
            bits[d] = sign | ((x & np.uint32(0x7FFF)) << np.uint32(13))
        for d in range(len(raw)):
            out[d] *= FP16_REBIAS
    else:
        for d in range(len(raw)):
            bits[d] = np.uint32(raw[d])


@inlined
def tail_of(pages, blocks, slot, head):
    """First tail word of the (block, head) that holds a slot; `row_size` to the next.

    Words lie row by row, those of all heads together (`hashevict_vllm.cache.page`).
    """
    block = np.int64(blocks[slot // pages.block_size])
    return block * pages.word_stride + pages.first_word + head * pages.block_size


@inlined
def word_of(pages, blocks, slot, head):
    """First tail word of a slot; `row_size` to its next, the position is the last."""
    return tail_of(pages, blocks, slot, head) + slot % pages.block_size


@inlined
def row_size(pages):
    """Tail words between one word of a slot and its next: H N."""
    return pages.heads * pages.block_size


@inlined
def prefetch_rows(pages, blocks, first, end, head, first_row, last_row):
    """Ask for rows [first_row, last_row) of the tail, where slots [first, end) lie.

    ``first`` is a block's first slot.
    """
    size = row_size(pages)
    for slot in range(first, end, pages.block_size):
        start = tail_of(pages, blocks, slot, head)
        for row in range(first_row, last_row):
            for word in range(0, pages.block_size, 16):
                prefetch(pages.tail, start + row * size + word)


@inlined
def elements_of(pages, blocks, slot, head):
    """First K/V element of the (block, head) that holds a slot."""
    block = np.int64(blocks[slot // pages.block_size])
    return block * pages.element_stride + head * 2 * pages.block_size * pages.dim


@inlined
def _load_elements(pages, blocks, slot, head, slot_map, out):
    """Read a slot's K or V into float32 ``out`` [D]; ``slot_map`` int32 [N, D]."""
    start = elements_of(pages, blocks, slot, head)
    page = pages.elements[start : start + pages.block_size * pages.dim * 2]
    at = slot_map[slot % pages.block_size]
    bits = out.view(np.uint32)
    for d in range(len(out)):
        bits[d] = page[at[d]]
    load(bits, pages.kind, out)


@inlined
def load_key(pages, blocks, slot, head, out):
    """Read the key of a slot as float32 into ``out`` [D]."""
    _load_elements(pages, blocks, slot, head, pages.k_map, out)


@inlined
def load_value(pages, blocks, slot, head, out):
    """Read the value of a slot as float32 into ``out`` [D]."""
    _load_elements(pages, blocks, slot, head, pages.v_map, out)
    if pages.kind == FLOAT16:  # `load` makes 65,536 and more of what is not finite
        for d in range(len(out)):
            finite = abs(out[d]) < np.float32(65536)
            out[d] = out[d] if finite else np.float32(np.nan)


@inlined
def prefetch_lines(pages, blocks, slot, head, slot_map):
    """Ask for the lines of a slot's K or V; ``slot_map`` int32 [N, D] says which."""
    start = elements_of(pages, blocks, slot, head)
    at, last = slot_map[slot % pages.block_size], np.int64(-1)
    for d in range(len(at)):
        place = start + at[d]
        # 64 bytes hold 32 elements of two bytes, and 16 of four.
        if place // 32 != last:
            prefetch(pages.elements, place)
            last = place // 32


@inlined
def prefetch_slot(pages, blocks, slot, head):
    """Ask for the lines of a slot's K and V."""
    prefetch_lines(pages, blocks, slot, head, pages.k_map)
    prefetch_lines(pages, blocks, slot, head, pages.v_map)


@inlined
def copy_in(pages, tokens, row, blocks, slot, head):
    """Write K and V of a token (`hashevict_vllm.kernels.cpu.tokens`) to a slot."""
    start, dim = elements_of(pages, blocks, slot, head), pages.dim
    page = pages.elements[start : start + 2 * pages.block_size * dim]
    at = row * tokens.k_stride + head * dim
    key = tokens.k[at : at + dim]
    at = row * tokens.v_stride + head * dim
    value = tokens.v[at : at + dim]
    offset = slot % pages.block_size
    key_at, value_at = pages.k_map[offset], pages.v_map[offset]
    for d in range(len(key)):
        page[key_at[d]] = key[d]
        page[value_at[d]] = value[d]


@inlined
def write_words(pages, blocks, slot, head, words, position):
    """Write what a slot keeps of its key, int32 [W], and its position."""
    size, at = row_size(pages), word_of(pages, blocks, slot, head)
    for w in range(pages.words):
        pages.tail[at + w * size] = words[w]
    pages.tail[at + pages.words * size] = position
