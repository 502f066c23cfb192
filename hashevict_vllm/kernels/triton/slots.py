"""Where the metadata of a slot lies in the pages of one KV head (device functions)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def meta_of(tail, table, slots, used, head, block_stride, head_stride, N: tl.constexpr):
    """Pointers to the first word that the tail keeps of each slot.

    Word w of a slot lies w word strides further, its position after the last word.

    Args:
        tail: int32 pointer to the metadata of block 0, head 0.
        table: int32 pointer to the request's block numbers.
        slots: int32 [n], slots of the request.
        used: bool [n]; for the others nothing is read and the pointer is not valid.
        head: KV head.
        block_stride: Words between blocks; may exceed 2^31 only in the product.
        head_stride: Words between heads.
        N: Slots of a block.

    """
    block = tl.load(table + slots // N, mask=used, other=0).to(tl.int64)
    return tail + block * block_stride + head * head_stride + slots % N
