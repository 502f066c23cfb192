"""A budgeted layer on poisoned paged memory: the plan and the kernels, no vLLM."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
import torch

from hashevict_vllm.attention.cpu.constants import rule_array, vote_strengths
from hashevict_vllm.attention.rounds import Pieces
from hashevict_vllm.cache.page import LayerPages, tail_bytes
from hashevict_vllm.kernels.cpu import launch
from hashevict_vllm.kernels.cpu.openmp import find_openmp
from hashevict_vllm.kernels.cpu.tokens import addresses
from hashevict_vllm.kernels.projection import make_projection
from hashevict_vllm.plan import cut_chunk, occupied_slots
from hashevict_vllm.policies import make_rule
from hashevict_vllm.resolved import ResolvedKVPolicy

POISON = 0x5A


class PagedLayer:
    """Pages of one layer for several requests, filled with poison, blocks shuffled."""

    def __init__(
        self,
        policy: ResolvedKVPolicy,
        prompt_lens: list[int],
        total_lens: list[int],
        heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        threads: int = 1,
    ) -> None:
        self.threads = threads
        self.policy, self.prompt_lens = policy, prompt_lens
        self.heads, self.head_dim, self.block_size = heads, head_dim, block_size
        self.dtype = dtype
        self.computed = [0] * len(prompt_lens)
        bound = policy.budget + (policy.segment if policy.segment > 1 else 0)
        width = -(-min(bound, max(total_lens)) // block_size)
        num_blocks = width * len(prompt_lens) + 3
        size = dtype.itemsize
        kv = heads * block_size * 2 * head_dim * size
        rule = make_rule(policy)
        self.words = rule.words
        page = kv + tail_bytes(heads, block_size, rule.words) + 64
        self.buffer = torch.full((num_blocks * page,), POISON, dtype=torch.uint8)
        self.kv_cache = torch.as_strided(
            self.buffer.view(dtype),
            (num_blocks, heads, block_size, 2 * head_dim),
            (page // size, block_size * 2 * head_dim, 2 * head_dim, 1),
        )
        self.pages = LayerPages(self.kv_cache, rule.words, rule.projected_bits)
        order = torch.randperm(num_blocks - 1)[: width * len(prompt_lens)] + 1
        self.block_table = order.view(len(prompt_lens), width).int().numpy()
        self.projection = (
            make_projection(
                head_dim, rule.projected_bits, policy.seed, policy.orthogonal
            )
            .numpy()
            .ravel()
        )
        slot, d = np.arange(block_size)[:, None], np.arange(head_dim)[None]
        # K transposed and V row-major, as vLLM's "vec" kernels keep them.
        self.k_map = (d * block_size + slot).astype(np.int32)
        self.v_map = (block_size * head_dim + slot * head_dim + d).astype(np.int32)
        self.rule = rule_array(policy)
        self.strengths = vote_strengths(policy, head_dim**-0.5, head_dim)

    def step(
        self, chunks: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    ) -> None:
        """One engine step: per request the next tokens' q, k, v (maybe none)."""
        pieces, row = [], 0
        for request, (_, k, _) in enumerate(chunks):
            start = self.computed[request]
            self.computed[request] = end = start + len(k)
            plen = self.prompt_lens[request]
            pieces.append(list(cut_chunk(self.policy, request, row, start, end, plen)))
            row += len(k)
        q, k, v = (torch.cat(x).to(self.dtype) for x in zip(*chunks, strict=True))
        for together in zip_longest(*pieces):
            self._round([piece for piece in together if piece is not None], q, k, v)

    def _round(self, pieces, q, k, v) -> None:  # type: ignore[no-untyped-def]
        from hashevict_vllm.attention.cpu.metadata import round_arrays

        arrays = round_arrays(Pieces.of(pieces))
        common = (
            self.block_table,
            self.projection,
            self.k_map,
            self.v_map,
            self.pages.kernel_geometry,
            self.rule,
            self.strengths,
            np.array([find_openmp()[0], self.threads], np.int64),
        )
        # A model's q, k and v are slices of one projection: rows do not lie together.
        joined = torch.cat([q, k, v], dim=1)
        sizes = [x.shape[1] for x in (q, k, v)]
        places = addresses(*joined.split(sizes, dim=1))
        launch.write_tokens(
            self.pages.elements,
            self.pages.tail,
            places,
            arrays["token_rows"],
            arrays["positions"],
            arrays["slots"],
            arrays["evict"],
            arrays["recent"],
            arrays["requests"],
            *common,
        )
        launch.replay_segments(
            self.pages.elements,
            self.pages.tail,
            places,
            arrays["replay"],
            *common,
        )

    def live(self, request: int) -> tuple[torch.Tensor, ...]:
        """Live slots by ascending position: position, words, k, v, per head."""
        count = occupied_slots(
            self.policy, self.computed[request], self.prompt_lens[request]
        )
        slots = np.arange(count)
        blocks, offsets = self.block_table[request][slots // self.block_size], slots
        offsets = offsets % self.block_size
        words = self.words
        meta = self.pages.slot_words[blocks, :, :, offsets]  # [n, H, W + 1]
        cells = self.kv_cache.flatten(2).view(len(self.kv_cache), self.heads, -1)
        position = torch.from_numpy(meta[:, :, words].copy()).T
        order = position.argsort(dim=1)
        take = torch.from_numpy(slots)[order]
        heads = torch.arange(self.heads)[:, None].expand_as(take)
        block, offset = torch.from_numpy(blocks).long(), torch.from_numpy(offsets)
        page = cells[block[take], heads]  # [H, n, 2 N D]
        k = page.gather(2, torch.from_numpy(self.k_map).long()[offset[take]])
        v = page.gather(2, torch.from_numpy(self.v_map).long()[offset[take]])
        signature = torch.from_numpy(meta[:, :, :words].copy()).transpose(0, 1)
        signature = signature[heads, order]
        return position.gather(1, order), signature, k, v
