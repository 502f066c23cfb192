"""Copies of whole pages, with their tails, between steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from hashevict_vllm.kernels.codes import OCTAVES
from hashevict_vllm.kernels.pages import view_pages


class PageCopy(NamedTuple):
    """A block whose pages become a copy of another's before the next forward.

    Attributes:
        src_block_id: The source; the destination itself where only its tail is reset.
        dst_block_id: The destination.
        group_id: KV-cache group, whose layers' pages are copied.
        keeps_votes: Whether the tail is copied as it is: a snapshot. Otherwise votes
            are zeroed (not how large values are, which lies beside them) and marks
            removed, as both depend on the request that made them.

    """

    src_block_id: int
    dst_block_id: int
    group_id: int
    keeps_votes: bool


def copy_pages(
    kv_cache: torch.Tensor, page_bytes: int, words: int, copies: Sequence[PageCopy]
) -> None:
    """Copy pages of one layer; all sources are read before anything is written.

    Args:
        kv_cache: [B, H, N, 2D] as vLLM binds it.
        page_bytes: Bytes of one page: K/V, tail and padding.
        words: W, words that the rule keeps per slot, the last of which holds votes.
        copies: Destinations are distinct.

    """
    moved = [copy for copy in copies if copy.src_block_id != copy.dst_block_id]
    if moved:
        pages = _whole_pages(kv_cache, page_bytes)
        source = _ids((copy.src_block_id for copy in moved), kv_cache.device)
        target = _ids((copy.dst_block_id for copy in moved), kv_cache.device)
        pages.index_copy_(0, target, pages.index_select(0, source))
    fresh = [copy.dst_block_id for copy in copies if not copy.keeps_votes]
    if fresh:
        tail = view_pages(kv_cache, words).tail
        rows = _ids(fresh, kv_cache.device)
        tail[rows, :, words - 1] &= OCTAVES
        position = tail[rows, :, words]
        tail[rows, :, words] = torch.where(position < 0, ~position, position)


def _whole_pages(kv_cache: torch.Tensor, page_bytes: int) -> torch.Tensor:
    """Words of all pages of a layer, int32 [B, page bytes / 4]."""
    size = kv_cache.element_size()
    raw = torch.empty(0, dtype=torch.int32, device=kv_cache.device)
    return raw.set_(
        kv_cache.untyped_storage(),
        kv_cache.storage_offset() * size // 4,
        (kv_cache.shape[0], page_bytes // 4),
        (kv_cache.stride(0) * size // 4, 1),
    )


def _ids(ids: Iterable[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device="cpu").to(device)
