"""Where K, V, signature and position lie in a page.

A page is one layer's share of one block. Stock K/V come first, in whatever order the
inner backend's kernels want; the metadata of the block's slots follow in a tail that
vLLM accounts for as page padding::

    | K/V: H heads x N slots x 2D elements | tail: (W + 1) x H x N words of 32 bits |

The tail holds W rows of the rule's words, such as a signature, and last a row of
positions. A row has the words of all heads, N slots each, so that a scan, which reads
few of the rows, reads contiguous memory: on a CPU it is bound by the pages of memory
that it touches. The position of a slot that was evicted while its segment is still open
is stored as ``~position`` (design 1.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hashevict_vllm.kernels import codes

WORD_BYTES = 4

ELEMENT_KINDS = {
    torch.float32: codes.FLOAT32,
    torch.bfloat16: codes.BFLOAT16,
    torch.float16: codes.FLOAT16,
}


def tail_bytes(num_kv_heads: int, block_size: int, words: int) -> int:
    """Bytes of a page's tail: W words of the rule and the position, per (slot, head).

    Proportional to the block size, as vLLM may scale blocks of hybrid models.
    """
    return num_kv_heads * block_size * (words + 1) * WORD_BYTES


@dataclass(frozen=True)
class PageGeometry:
    """Sizes and strides of one layer's pages.

    Attributes:
        num_kv_heads: H on this rank.
        block_size: N slots per block.
        head_dim: D.
        words: W signature words per slot.
        element_size: Bytes of one K/V element.
        block_stride: Bytes between the pages of consecutive blocks.

    """

    num_kv_heads: int
    block_size: int
    head_dim: int
    words: int
    element_size: int
    block_stride: int

    @property
    def head_elements(self) -> int:
        """K/V elements of one (block, head): 2 N D."""
        return 2 * self.block_size * self.head_dim

    @property
    def kv_bytes(self) -> int:
        """Bytes before the tail."""
        return self.num_kv_heads * self.head_elements * self.element_size

    @property
    def page_bytes(self) -> int:
        """Bytes of K/V and tail."""
        tail = tail_bytes(self.num_kv_heads, self.block_size, self.words)
        return self.kv_bytes + tail


class LayerPages:
    """Raw views of one layer's KV cache, for kernels that address slots per head.

    Attributes:
        geometry: Sizes and strides.
        elements: numpy unsigned integers of the K/V element size, 1-D, the layer's
            whole region; block b starts at ``b * block_stride / element_size``.
        tail: numpy int32, 1-D over the same bytes.
        kernel_geometry: int64 [9], how `kernels.cpu.launch` addresses a slot:
            H, N, D, W, element and word stride of a block, first tail word of a page,
            element kind, b.

    """

    def __init__(self, kv_cache: torch.Tensor, words: int, projected_bits: int) -> None:
        """View a layer's KV cache.

        Args:
            kv_cache: [B, H, N, 2D] as vLLM binds it: pages of stride
                ``kv_cache.stride(0)``, dense inside.
            words: W, words that the rule keeps per slot.
            projected_bits: b, columns of the projection.

        Raises:
            ValueError: If the page has no room for the tail or is not dense inside.

        """
        num_blocks, heads, block_size, content = kv_cache.shape
        size = kv_cache.element_size()
        self._num_blocks = num_blocks
        self.geometry = geometry = PageGeometry(
            num_kv_heads=heads,
            block_size=block_size,
            head_dim=content // 2,
            words=words,
            element_size=size,
            block_stride=kv_cache.stride(0) * size,
        )
        dense = (block_size * content, content, 1)
        if kv_cache.stride()[1:] != dense:
            raise ValueError(
                "HashEvict needs head-major pages (layout LBHNC); got strides "
                f"{kv_cache.stride()} for shape {tuple(kv_cache.shape)}."
            )
        if geometry.block_stride < geometry.page_bytes:
            raise ValueError(
                f"A page of {geometry.block_stride} bytes has no room for "
                f"{geometry.page_bytes} bytes of K/V and metadata."
            )
        length = (num_blocks - 1) * geometry.block_stride + geometry.page_bytes
        raw = torch.as_strided(
            torch.empty(0, dtype=torch.uint8).set_(kv_cache.untyped_storage()),
            (length,),
            (1,),
            kv_cache.storage_offset() * size,
        ).numpy()
        self.elements: np.ndarray = raw[: length // size * size].view(f"u{size}")
        self.tail: np.ndarray = raw[: length // WORD_BYTES * WORD_BYTES].view(np.int32)
        self.kernel_geometry = np.array(
            [
                heads,
                block_size,
                geometry.head_dim,
                geometry.words,
                geometry.block_stride // size,
                geometry.block_stride // WORD_BYTES,
                geometry.kv_bytes // WORD_BYTES,
                ELEMENT_KINDS[kv_cache.dtype],
                projected_bits,
            ],
            np.int64,
        )

    @property
    def slot_words(self) -> np.ndarray:
        """What slots keep, int32 [B, H, W + 1, N], a view; positions are last."""
        g, item = self.geometry, WORD_BYTES
        head = g.block_size * item
        return np.lib.stride_tricks.as_strided(
            self.tail[g.kv_bytes // item :],
            (self._num_blocks, g.num_kv_heads, g.words + 1, g.block_size),
            (g.block_stride, head, g.num_kv_heads * head, item),
        )
