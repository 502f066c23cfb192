"""Where the metadata of a slot lies in the pages of one KV head (device functions)."""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels.triton.arguments import Head
from hashevict_vllm.kernels.triton.pieces import REQUEST


@triton.jit
def head_of(step, page, piece, head):
    """The KV head of the request that a piece belongs to (`Head`).

    Args:
        step: `Step`.
        page: `Page`.
        piece: int32 pointer to a row of the step's pieces.
        head: KV head.

    """
    request = tl.load(piece + REQUEST).to(tl.int64)
    return Head(page, step.table + request * step.row, head)


@triton.jit
def meta_of(at, slots, used, sizes: tl.constexpr):
    """Pointers to the first word that the tail keeps of each slot.

    Word w of a slot lies w word strides further, its position after the last word.

    Args:
        at: `Head`.
        slots: int32 [n], slots of the request.
        used: bool [n]; for the others nothing is read and the pointer is not valid.
        sizes: `Sizes`.

    """
    block = tl.load(at.table + slots // sizes.block, mask=used, other=0).to(tl.int64)
    # Only the product with the block stride may exceed 2^31.
    first = at.page.tail + block * at.page.block
    return first + at.index * at.page.head + slots % sizes.block


@triton.jit
def load_elements(elements, scale, at, used):
    """Elements of stored keys or values in float32, 0 where not used.

    Args:
        elements: Pointer to ``page.k`` or ``page.v``.
        scale: float32 pointer to what an fp8 cache is multiplied by, or None.
        at: int64, of any shape, see `key_rows`.
        used: bool, of that shape.

    """
    x = tl.load(elements + at, mask=used, other=0.0).to(tl.float32)
    if scale is not None:
        x = x * tl.load(scale)
    return x


@triton.jit
def key_rows(page, table, head, slots, used, sizes: tl.constexpr):
    """Where stored keys begin, of one or of several: int64, in elements.

    Args:
        page: `Page`.
        table: int32 pointer to the request's block numbers, or pointers.
        head: KV head.
        slots: int32, or of a shape.
        used: bool, likewise; for the others nothing is read and the row is not valid.
        sizes: `Sizes`.

    """
    block = tl.load(table + slots // sizes.block, mask=used, other=0).to(tl.int64)
    first = block * page.k_block + head * page.k_head
    return first + slots % sizes.block * page.k_slot


@triton.jit
def value_rows(page, table, head, slots, used, sizes: tl.constexpr):
    """Where stored values begin; arguments as `key_rows`."""
    block = tl.load(table + slots // sizes.block, mask=used, other=0).to(tl.int64)
    first = block * page.v_block + head * page.v_head
    return first + slots % sizes.block * page.v_slot
