"""K, V and metadata of one layer's pages as tensors, for kernels that take strides."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_WORD_BYTES = 4


@dataclass(frozen=True)
class DevicePages:
    """Views of one layer's KV cache; no layout is assumed beyond a page with a tail.

    Attributes:
        k: [B, H, N, D], elements of a slot contiguous.
        v: [B, H, N, D], likewise.
        tail: int32 [B, H, W + 1, N]: W words of the rule, then the position.

    """

    k: torch.Tensor
    v: torch.Tensor
    tail: torch.Tensor


def view_pages(
    kv_cache: torch.Tensor, words: int, fp8_dtype: torch.dtype | None = None
) -> DevicePages:
    """View a layer's KV cache as vLLM 0.32 binds it to every CUDA backend.

    The logical shape is the same for all; heads and slots may lie in either order
    inside a page (vllm/v1/kv_cache_layout.py: LBHNC, LBNHC and those with B outermost).

    Args:
        kv_cache: [B, H, N, 2D]; K fills the first half of the last dimension.
        words: W, words that the rule keeps per slot.
        fp8_dtype: What the bytes of a quantised cache mean; vLLM binds them as uint8.

    Raises:
        ValueError: If a page is not dense before its tail, or has no room for one.

    """
    if fp8_dtype is not None:
        kv_cache = kv_cache.view(fp8_dtype)
    blocks, heads, slots, content = kv_cache.shape
    size = kv_cache.element_size()
    inner = sorted(zip(kv_cache.stride()[1:], kv_cache.shape[1:], strict=True))
    expected = 1
    for stride, length in inner:
        # A dimension of length one may have any stride.
        if length > 1 and stride != expected:
            raise ValueError(
                "HashEvict needs K/V to be dense inside a page; got strides "
                f"{kv_cache.stride()} for shape {tuple(kv_cache.shape)}."
            )
        expected *= length
    kv_bytes = heads * slots * content * size
    page_bytes = kv_cache.stride(0) * size
    needed = kv_bytes + heads * (words + 1) * slots * _WORD_BYTES
    if page_bytes < needed or kv_bytes % _WORD_BYTES or page_bytes % _WORD_BYTES:
        raise ValueError(
            f"A page of {page_bytes} bytes has no room for {needed} bytes of K/V and "
            "metadata in words of four bytes."
        )
    raw = torch.empty(0, dtype=torch.int32, device=kv_cache.device)
    raw.set_(
        kv_cache.untyped_storage(),
        (kv_cache.storage_offset() * size + kv_bytes) // _WORD_BYTES,
        (blocks, heads, words + 1, slots),
        (page_bytes // _WORD_BYTES, slots, heads * slots, 1),
    )
    k, v = kv_cache.split(content // 2, dim=-1)
    return DevicePages(k, v, raw)
