"""A budgeted layer on poisoned paged memory: the Triton kernels alone, no vLLM."""

from __future__ import annotations

from itertools import pairwise

import torch

from hashevict_vllm.attention.gpu.rule import device_rule, vote_factor
from hashevict_vllm.kernels.pages import DevicePages, view_pages
from hashevict_vllm.kernels.projection import make_projection
from hashevict_vllm.kernels.triton import ops
from hashevict_vllm.kernels.triton.arguments import (
    Estimate,
    Page,
    Scratch,
    Signed,
    Step,
    Tokens,
)
from hashevict_vllm.plan import cut_chunk, occupied_slots
from hashevict_vllm.resolved import ResolvedKVPolicy

POISON = 0x5A
LAYOUTS = ("heads first", "slots first", "K and V apart")
SCALE = 0.25


def make_pages(
    layout: str,
    blocks: int,
    heads: int,
    slots: int,
    head_dim: int,
    words: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, DevicePages]:
    """A poisoned buffer and the pages in it; every page ends in 64 unused bytes."""
    size = dtype.itemsize
    kv, tail = heads * slots * 2 * head_dim * size, heads * (words + 1) * slots * 4
    page = kv + tail + 64
    buffer = torch.full((blocks * page,), POISON, dtype=torch.uint8)
    if layout == "K and V apart":  # [2, B, N, H, D] with a tail of its own, as strides
        half = torch.as_strided(
            buffer.view(dtype),
            (2, blocks, heads, slots, head_dim),
            (kv // 2 // size, page // size, head_dim, heads * head_dim, 1),
        )
        words_view = torch.as_strided(
            buffer.view(torch.int32),
            (blocks, heads, words + 1, slots),
            (page // 4, slots, heads * slots, 1),
            kv // 4,
        )
        return buffer, DevicePages(half[0], half[1], words_view)
    content = 2 * head_dim
    inner = (
        (slots * content, content)
        if layout == "heads first"
        else (content, heads * content)
    )
    cache = torch.as_strided(
        buffer.view(dtype),
        (blocks, heads, slots, content),
        (page // size, *inner, 1),
    )
    return buffer, view_pages(cache, words)


class TritonLayer:
    """Pages of one layer for several requests; every step is planned on the device."""

    def __init__(
        self,
        policy: ResolvedKVPolicy,
        prompt_lens: list[int],
        total_lens: list[int],
        heads: int,
        group: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        layout: str = LAYOUTS[0],
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.policy, self.prompt_lens = policy, prompt_lens
        self.heads, self.group, self.head_dim = heads, group, head_dim
        self.block_size, self.dtype = block_size, dtype
        self.rule = device_rule(policy)
        self.computed = [0] * len(prompt_lens)
        longest = max(total_lens)
        segment = policy.segment if policy.segment > 1 else 0
        self.bound = min(policy.budget + segment, longest)
        width = -(-self.bound // block_size)
        blocks = width * len(prompt_lens) + 3
        self.buffer, self.pages = make_pages(
            layout,
            blocks,
            heads,
            block_size,
            head_dim,
            self.rule.words,
            cache_dtype or dtype,
        )
        order = torch.randperm(blocks - 1)[: width * len(prompt_lens)] + 1
        self.block_table = order.view(len(prompt_lens), width).int()
        self.projection = make_projection(
            head_dim, self.rule.bits, policy.seed, policy.orthogonal
        )
        factor = vote_factor(policy, head_dim)
        values = (policy.credit, policy.value_votes)
        self.estimate = Estimate.of(
            self.projection, SCALE, factor, policy.decay, *values
        )
        self.scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if cache_dtype is not None:
            self.scales = (torch.tensor([0.5]), torch.tensor([0.25]))

    def step(
        self,
        chunks: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        padding: int = 0,
    ) -> None:
        """One engine step: per request the next tokens' q, k, v (maybe none).

        ``padding`` rows and requests follow the batch, as in a captured graph.
        """
        starts, lens = [0], []
        scans: list[bool] = []  # of every round: does a token evict, or vote alone?
        for request, (_, k, _) in enumerate(chunks):
            start = self.computed[request]
            self.computed[request] = end = start + len(k)
            plen = self.prompt_lens[request]
            pieces = list(cut_chunk(self.policy, request, 0, start, end, plen))
            scans += [False] * (len(pieces) - len(scans))
            for index, piece in enumerate(pieces):
                scans[index] |= piece.count == 1
            starts.append(starts[-1] + len(k))
            lens.append(end)
        num = len(chunks) + padding
        tokens = starts[-1] + padding
        q, k, v = (
            torch.cat([*x, torch.full((padding, *x[0].shape[1:]), float("nan"))])
            .to(self.dtype)
            .contiguous()
            for x in zip(*chunks, strict=True)
        )
        starts += [starts[-1]] * padding
        lens += [0] * padding
        self._rounds(scans, num, tokens, starts, lens, q, k, v)

    def _rounds(self, scans, num, tokens, starts, lens, q, k, v) -> None:  # type: ignore[no-untyped-def]
        """Plan, sign, write and reduce; every buffer is poisoned before."""

        def poisoned(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.full(shape, -123456789, dtype=dtype)

        rule, group, heads = self.rule, self.group, self.heads
        pieces, live = poisoned(num, ops.NUM_COLUMNS), poisoned(num)
        done, token_piece = poisoned(num), poisoned(tokens)
        signed = Signed(
            poisoned(tokens, heads, group + 1, rule.hashed),
            torch.full((tokens, heads, group + 1), float("nan")),
        )
        prompts = self.prompt_lens + [0] * (num - len(self.prompt_lens))
        ints = {"dtype": torch.int32}
        arguments = (
            torch.tensor(starts, **ints),
            torch.tensor(lens, **ints),
            torch.tensor(prompts, **ints),
            torch.full((num,), self.policy.budget, **ints),
            torch.full((num,), self.policy.recent, **ints),
            done,
            pieces,
            live,
            token_piece,
            rule,
        )
        all_tokens = Tokens.of(q, k, v)
        if rule.signs:
            ops.sign(all_tokens, self.projection, signed, rule)
        page = Page.of(self.pages, *self.scales)
        step = Step.of(pieces, token_piece, self.block_table, heads)
        layer = (all_tokens, signed, step, page)
        scratch = Scratch.of(rule, 3, group, self.head_dim, q.device)
        for part in scratch:
            part.fill_(-123456789)
        queries = torch.full((tokens, *q.shape[1:]), float("nan"), dtype=q.dtype)
        longest = max(lens) + 1
        decodes = all(end - start <= 1 for start, end in pairwise(starts))
        for index, scan in enumerate(scans):
            ops.plan(*arguments, index == 0)
            asking = q
            if scan:  # as in a decode step: queries are kept, and the model goes on
                alone = step._replace(token_piece=None if decodes else token_piece)
                decode = (all_tokens, signed, alone, page)
                ops.write(*decode, rule, True, queries=queries)
                asking = queries
            else:
                ops.write(*layer, rule, False)
            if rule.votes:
                if not scan or tokens > len(pieces):
                    ops.describe(step, page, self.projection, rule)
                ask = Tokens.asking(asking)
                ops.ballot(ask, step, page, self.estimate, scratch, rule)
            ops.mark(*layer, self.estimate, rule, self.bound, longest)
            ops.compact(step, page, rule, self.bound)

    def live(self, request: int) -> tuple[torch.Tensor, ...]:
        """Live slots by ascending position: position, words, k, v, per head."""
        count = occupied_slots(
            self.policy, self.computed[request], self.prompt_lens[request]
        )
        slots = torch.arange(count)
        blocks = self.block_table[request].long()[slots // self.block_size]
        meta = self.pages.tail[blocks, :, :, slots % self.block_size]  # [n, H, W + 1]
        order = meta[:, :, -1].argsort(dim=0)
        heads = torch.arange(self.heads)[None].expand_as(order)
        meta = meta[order, heads].transpose(0, 1)
        k, v = (
            cache[blocks[order], heads, (slots % self.block_size)[order]].transpose(
                0, 1
            )
            for cache in (self.pages.k, self.pages.v)
        )
        return meta[..., -1], meta[..., :-1], k, v

    def untouched(self) -> bool:
        """Whether block 0, which no request owns, and the ends of pages are as made."""
        pages = self.buffer.view(len(self.pages.k), -1)
        return bool((pages[0] == POISON).all() and (pages[:, -64:] == POISON).all())
