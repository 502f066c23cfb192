"""Shapes of models for which the kernels are compiled and reported on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.projection import num_words
from hashevict_vllm.kernels.triton import ops
from hashevict_vllm.kernels.triton.aot import Launch, recorded_launches
from hashevict_vllm.kernels.triton.pages import view_pages
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
            sinks=16 if self.kind == codes.VOTE else 4,
            recent=self.budget // 4,
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
        """What the operators launch for this shape, in decode and for a segment."""
        rule, tokens = self.rule, self.tokens
        heads, group, dim = self.heads, self.group, self.head_dim
        q = torch.empty(tokens, heads * group, dim, dtype=self.dtype)
        k = torch.empty(tokens, heads, dim, dtype=self.dtype)
        signatures = torch.empty(tokens, heads, group + 1, rule.hashed).int()
        squares = torch.empty(tokens, heads, group + 1)
        projection = torch.empty(dim, max(rule.bits, 1))
        slots = torch.zeros(tokens, heads).int()
        cache_dtype = self.cache_dtype or self.dtype
        content = heads * self.block_size * 2 * dim
        page = content + heads * (rule.words + 1) * self.block_size * 4
        pages = view_pages(
            torch.empty(2, page, dtype=cache_dtype)[:, :content].unflatten(
                1, (heads, self.block_size, 2 * dim)
            ),
            rule.words,
        )
        cache = (pages.k, pages.v, pages.tail)
        table = torch.zeros(tokens, -(-self.bound // self.block_size)).int()
        pieces = torch.zeros(tokens, ops.NUM_COLUMNS).int()
        ints = [torch.zeros(tokens + 1).int() for _ in range(6)]
        scale = torch.ones(1) if cache_dtype.itemsize == 1 else None
        signed, votes = (
            (signatures, squares),
            (0.1, 0.125, 0.85, list(rule), self.bound),
        )
        with recorded_launches() as launches:
            ops.plan(*ints[:4], pieces, ints[4], ints[5], list(rule), True)
            if rule.signs:
                ops.sign(q, k, projection, *signed, list(rule))
            for scans in (True, False):
                ops.write(
                    q, k, k, *signed, pieces, ints[5], table, *cache, scale, scale,
                    projection, slots, *votes, scans,
                )  # fmt: skip
            if rule.votes:
                ops.describe(
                    pieces, ints[5], slots, table, pages.k, scale, pages.tail,
                    projection, list(rule),
                )  # fmt: skip
            ops.mark(
                q, signatures, pieces, table, pages.k, scale, pages.tail, projection,
                *votes,
            )  # fmt: skip
            ops.compact(pieces, table, *cache, list(rule), self.bound)
        return launches


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
    "vote, fp8 e5m2": Shape(kind=codes.VOTE, cache_dtype=torch.float8_e5m2),
}
"""Shapes that are tested, by what they are for: every rule, dtype, head and block size
in some of them, and the most registers and words."""
