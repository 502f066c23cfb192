"""Copies of pages: K, V and tails arrive, votes and marks do not; no other changes."""

from __future__ import annotations

import pytest
import torch

from hashevict_vllm.cache.copies import PageCopy, copy_pages
from hashevict_vllm.cache.page import tail_bytes
from hashevict_vllm.kernels.codes import OCTAVES
from hashevict_vllm.kernels.pages import view_pages

B, H, N, D, WORDS = 7, 2, 16, 8, 4
KV = H * N * 2 * D * 4
PADDING = 64
PAGE = KV + tail_bytes(H, N, WORDS) + PADDING
LAYERS = 2


def layers(block_outermost: bool, slots_first: bool) -> list[torch.Tensor]:
    """Caches of two layers in one storage, as vLLM binds them: [B, H, N, 2D]."""
    raw = torch.empty(LAYERS * B * PAGE // 4).random_(2**24)
    # float32 numbers that are positions as well, if read as int32
    raw.view(torch.int32).copy_(torch.arange(len(raw)))
    block, layer = (LAYERS * PAGE, PAGE) if block_outermost else (PAGE, B * PAGE)
    head, slot = (2 * D, H * 2 * D) if slots_first else (N * 2 * D, 2 * D)
    return [
        raw.as_strided((B, H, N, 2 * D), (block // 4, head, slot, 1), i * layer // 4)
        for i in range(LAYERS)
    ]


@pytest.mark.parametrize("slots_first", [False, True], ids=["LBHNC", "LBNHC"])
@pytest.mark.parametrize("block_outermost", [False, True], ids=["layers", "blocks"])
def test_pages_are_copied_with_their_tails_and_nothing_else_changes(
    block_outermost: bool, slots_first: bool
) -> None:
    cache, other = layers(block_outermost, slots_first)
    tail = view_pages(cache, WORDS).tail
    tail[:, :, WORDS, ::3] = ~tail[:, :, WORDS, ::3]  # marked
    before, tail_before = cache.clone(), tail.clone()
    other_before = view_pages(other, WORDS).tail.clone()
    copies = [
        PageCopy(1, 2, 0, keeps_votes=False),
        PageCopy(2, 3, 0, keeps_votes=True),  # of what 2 held before
        PageCopy(4, 4, 0, keeps_votes=False),
    ]
    copy_pages(cache, PAGE, WORDS, copies)
    source = [0, 1, 1, 2, 4, 5, 6]
    assert torch.equal(cache, before[source])
    expected = tail_before[source]
    for block in (2, 4):
        expected[block, :, WORDS - 1] &= OCTAVES  # how large values are stays
        position = expected[block, :, WORDS]
        expected[block, :, WORDS] = torch.where(position < 0, ~position, position)
    assert torch.equal(tail, expected)
    assert torch.equal(view_pages(other, WORDS).tail, other_before)
    assert torch.equal(other, layers(block_outermost, slots_first)[1])
