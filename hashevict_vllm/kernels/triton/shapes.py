"""Shapes of models for which the kernels are compiled and reported on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.pages import view_pages
from hashevict_vllm.kernels.projection import num_words
from hashevict_vllm.kernels.triton import ops
from hashevict_vllm.kernels.triton.aot import Launch, recorded_launches
from hashevict_vllm.kernels.triton.arguments import (
    Estimate,
    Page,
    Scratch,
    Signed,
    Step,
    Tokens,
)
from hashevict_vllm.kernels.triton.rule import DeviceRule, make_salt

_WORDS_BESIDE_SIGNATURE = {codes.NORM: 1, codes.VOTE: 2}


@dataclass(frozen=True)
class Shape:
    """A layer of a model under a rule; the default is Llama-3-8B's.

    Attributes:
        kind: Kind of score, see `hashevict_vllm.kernels.codes`.
        head_dim: D.
        dtype: Of q, k and v.
        cache_dtype: Of the slots; None for that of k and v.
        block_size: N.
        heads: Hkv.
        group: Query heads per KV head.
        bits: b of rules that hash.
        budget: C.
        segment: S.
        tokens: T of the launch.

    """

    kind: int = codes.HAMMING_TO_QUERY
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype | None = None
    block_size: int = 16
    heads: int = 8
    group: int = 4
    bits: int = 64
    budget: int = 1024
    segment: int = 256
    tokens: int = 8

    @property
    def hashes(self) -> bool:
        """Whether the rule keeps signatures."""
        return self.kind in (codes.HAMMING_TO_KEY, codes.HAMMING_TO_QUERY, codes.VOTE)

    @property
    def rule(self) -> DeviceRule:
        """The rule with the shape's numbers."""
        bits = self.bits if self.hashes else 0
        return DeviceRule(
            kind=self.kind,
            words=num_words(bits) + _WORDS_BESIDE_SIGNATURE.get(self.kind, 0),
            bits=bits,
            sinks=4,
            salt=make_salt(0),
            budget=self.budget,
            segment=self.segment,
            window=16 if self.kind == codes.VOTE else 0,
            every=8,
            horizon=256,
            pool=15,
        )

    @property
    def bound(self) -> int:
        """Most slots of a request."""
        return self.budget + self.segment

    def launches(self) -> list[Launch]:
        """What is launched for this shape, in decode and for a segment."""
        rule, count, heads = self.rule, self.tokens, self.heads
        q = torch.empty(count, heads * self.group, self.head_dim, dtype=self.dtype)
        k = torch.empty(count, heads, self.head_dim, dtype=self.dtype)
        tokens = Tokens.of(q, k, k)
        signed = Signed(
            torch.empty(count, heads, self.group + 1, rule.hashed).int(),
            torch.empty(count, heads, self.group + 1),
        )
        page = self._page()
        projection = torch.empty(self.head_dim, max(rule.bits, 1))
        estimate = Estimate.of(projection, 0.1, 0.125, 0.95, 1024.0, 1.0)
        table = torch.zeros(count, -(-self.bound // self.block_size)).int()
        pieces = torch.zeros(count, ops.NUM_COLUMNS).int()
        starts, lens, prompts, budgets, done, live, owner = (
            torch.zeros(count + 1).int() for _ in range(7)
        )
        step = Step.of(pieces, owner, table, heads)
        scratch = Scratch.of(rule, 16, self.group, self.head_dim, q.device)
        made_up = torch.zeros(count + 1, dtype=torch.int64)
        of_requests = (starts, lens, prompts, budgets, budgets, done)
        plan = (*of_requests, pieces, live, owner, rule, True)
        with recorded_launches() as launches:
            ops.plan(*plan, made_up)
            if rule.signs:
                ops.sign(tokens, projection, signed, rule)
            layer = (tokens, signed, step, page)
            queries = torch.empty_like(q) if rule.votes else None
            alone = (tokens, signed, step._replace(token_piece=None), page)
            ops.write(*alone, rule, True, queries=queries)
            if rule.votes:
                ops.ballot(tokens, step, page, estimate, scratch, rule)
            ops.write(*layer, rule, False)
            if rule.votes:
                ops.describe(step, page, projection, rule)
            ops.mark(*layer, estimate, rule, self.bound, 4 * self.bound)
            ops.compact(step, page, rule, self.bound)
        return launches

    def _page(self) -> Page:
        """Two blocks of a layer."""
        cache_dtype, words = self.cache_dtype or self.dtype, self.rule.words
        shape = (self.heads, self.block_size, 2 * self.head_dim)
        content = self.heads * self.block_size * 2 * self.head_dim
        size = content + self.heads * (words + 1) * self.block_size * 4
        cache = torch.empty(2, size, dtype=cache_dtype)[:, :content]
        scale = torch.ones(1) if cache_dtype.itemsize == 1 else None
        return Page.of(view_pages(cache.unflatten(1, shape), words), scale, scale)


SHAPES = {
    "query, Llama-3-8B": Shape(),
    "key, float16, D 64, 16 bits": Shape(
        kind=codes.HAMMING_TO_KEY, head_dim=64, group=3, dtype=torch.float16, bits=16
    ),
    "query, float32, D 256, 128 bits": Shape(
        head_dim=256, block_size=128, dtype=torch.float32, bits=128
    ),
    "recency, D 80": Shape(kind=codes.RECENCY, head_dim=80, block_size=32),
    "norm, D 96": Shape(kind=codes.NORM, head_dim=96, block_size=48),
    "random": Shape(kind=codes.RANDOM),
    "vote, Llama-3-8B": Shape(kind=codes.VOTE),
    "vote, D 256, G 6": Shape(
        kind=codes.VOTE, head_dim=256, block_size=128, group=6, tokens=4096
    ),
    "vote, G 16, C 4096, whole prompt": Shape(
        kind=codes.VOTE, group=16, budget=4096, segment=131072, block_size=64
    ),
    "vote, fp8 e4m3": Shape(kind=codes.VOTE, cache_dtype=torch.float8_e4m3fn),
}
"""Shapes that are tested, by what they are for: every rule, dtype, head and block size
in some of them, and the most registers and words."""
