"""One attention layer on paged memory: vLLM's own CPU kernels and our eviction step.

The same pages serve both, at stride of a budgeted page, so that a comparison is one of
work alone. Nothing of vLLM's engine runs; how a step is planned and what a layer calls
are those of `hashevict_vllm.attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hashevict_vllm.attention.cpu.constants import rule_array, vote_strengths
from hashevict_vllm.attention.cpu.metadata import round_arrays
from hashevict_vllm.attention.rounds import Budgets, cut_step
from hashevict_vllm.cache.element_map import probe_element_map
from hashevict_vllm.cache.page import LayerPages, tail_bytes
from hashevict_vllm.kernels.cpu import launch
from hashevict_vllm.kernels.cpu.openmp import find_openmp
from hashevict_vllm.kernels.cpu.tokens import addresses
from hashevict_vllm.kernels.projection import make_projection
from hashevict_vllm.policies import make_rule
from hashevict_vllm.resolved import ResolvedKVPolicy


@dataclass(frozen=True)
class Shape:
    """What a layer looks like.

    Attributes:
        query_heads: Hq.
        kv_heads: Hkv.
        head_dim: D.
        block_size: N, tokens per block.
        dtype: Of q, k, v and the cache.

    """

    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 128  # vLLM's own on CPUs
    dtype: torch.dtype = torch.bfloat16

    @property
    def scale(self) -> float:
        """Softmax scale."""
        return float(self.head_dim**-0.5)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token in all heads."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def tokens(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random q [n, Hq, D], k and v [n, Hkv, D]."""
        heads = (self.query_heads, self.kv_heads, self.kv_heads)
        q, k, v = (
            torch.randn(n, h, self.head_dim, dtype=torch.float32).to(self.dtype)
            for h in heads
        )
        return q, k, v


class Attention:
    """A planned call of the stock attention kernel, as the engine makes per layer."""

    def __init__(
        self, layer: PagedCache, requests: list[int], counts: list[int], live: list[int]
    ) -> None:
        """Plan a call.

        Args:
            layer: The cache.
            requests: Rows of the block table.
            counts: Query tokens of each.
            live: Slots that each one's last token attends to.

        """
        from vllm import _custom_ops as ops

        shape = layer.shape
        self.layer, self.block_table = layer, layer.block_table[requests]
        self.seq_lens = torch.tensor(live, dtype=torch.int32)
        self.query_start_loc = torch.zeros(len(counts) + 1, dtype=torch.int32)
        self.query_start_loc[1:] = torch.tensor(counts).cumsum(0)
        self.scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(requests),
            num_heads=shape.query_heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            seq_lens=self.seq_lens,
            dtype=shape.dtype,
            query_start_loc=self.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=layer.isa,
            enable_kv_split=True,
        )

    def __call__(self, query: torch.Tensor, output: torch.Tensor) -> None:
        """Attend: query [T, Hq, D] into output, of the same shape."""
        from vllm import _custom_ops as ops

        key_cache, value_cache = self.layer.halves
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=self.query_start_loc,
            seq_lens=self.seq_lens,
            scale=self.layer.shape.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.block_table,
            softcap=0,
            scheduler_metadata=self.scheduler_metadata,
            s_aux=None,
        )


class PagedCache:
    """Random K and V of a batch of requests in shuffled blocks, as vLLM binds them.

    Attributes:
        shape: Of the layer.
        kv_cache: [B, Hkv, N, 2D], pages with room for ``words`` words per slot.
        block_table: int32 [batch, blocks of a request].
        isa: What vLLM calls the kernels' instruction set.

    """

    def __init__(
        self, shape: Shape, batch: int, slots: int, words: int | None = None
    ) -> None:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self.shape = shape
        width = -(-slots // shape.block_size)
        blocks, size = batch * width, shape.dtype.itemsize
        page = shape.block_size * shape.kv_bytes_per_token
        if words is not None:
            page += tail_bytes(shape.kv_heads, shape.block_size, words)
        content = 2 * shape.head_dim
        # As large as vLLM's own pool, pages apart by the padded stride.
        self._storage = torch.empty(blocks * page // size, dtype=shape.dtype)
        self.kv_cache = torch.as_strided(
            self._storage,
            (blocks, shape.kv_heads, shape.block_size, content),
            (page // size, shape.block_size * content, content, 1),
        )
        for block in self.kv_cache:  # one by one: no float32 copy of the pool
            block.copy_(torch.randn(block.shape, dtype=torch.float32))
        self.block_table = torch.randperm(blocks).view(batch, width).int()
        self.isa = _get_attn_isa(shape.dtype, shape.block_size, shape.head_dim)

    @property
    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as the stock kernels take them."""
        blocks, heads, block_size, content = self.kv_cache.shape
        rows = self.kv_cache.view(blocks, heads, 2 * block_size, content // 2)
        key, value = rows.chunk(2, dim=2)
        return key, value

    def write(
        self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """The stock cache update: k, v [T, Hkv, D] at flat slots int64 [T]."""
        from vllm import _custom_ops as ops

        ops.cpu_attn_reshape_and_cache(key, value, *self.halves, slots, self.isa)

    def flat_slots(self, request: int, first: int, count: int) -> torch.Tensor:
        """Flat slots int64 [count] of a request's slots [first, first + count)."""
        at = torch.arange(first, first + count)
        size = self.shape.block_size
        return self.block_table[request][at // size].long() * size + at % size


@dataclass(frozen=True)
class Step:
    """What all layers of a round share: the kernels' arrays and the attention call."""

    arrays: dict[str, np.ndarray]
    attention: Attention
    rows: slice


class BudgetedLayer:
    """Our eviction step and the stock attention on one `PagedCache`."""

    def __init__(
        self, policy: ResolvedKVPolicy, shape: Shape, batch: int, slots: int
    ) -> None:
        rule = make_rule(policy)
        self.policy, self.shape, self.batch = policy, shape, batch
        self.words = rule.words
        self.cache = PagedCache(shape, batch, slots, rule.words)
        self.pages = LayerPages(self.cache.kv_cache, rule.words, rule.projected_bits)
        projection = make_projection(
            shape.head_dim, rule.projected_bits, policy.seed, policy.orthogonal
        )
        small = PagedCache(shape, 1, 1)

        def write(k: Any, v: Any, kv_cache: Any, at: Any) -> None:
            small.kv_cache = kv_cache
            small.write(k, v, at)

        maps = probe_element_map(write, shape.block_size, shape.head_dim, shape.dtype)
        k_map, v_map = (x.astype(np.int32) for x in maps)
        self._common = (
            self.cache.block_table.numpy(),
            projection.numpy().ravel(),
            k_map,
            v_map,
            self.pages.kernel_geometry,
            rule_array(policy),
            vote_strengths(policy, shape.scale, shape.head_dim),
            find_openmp(),
        )
        launch.warm_up(np.dtype(f"u{shape.dtype.itemsize}"))

    def fill_metadata(self, position: int) -> None:
        """Random signatures and statistics, and distinct positions below ``position``.

        As after a long time of evictions: sinks where they were appended, the others
        anywhere.
        """
        g, tail = self.pages.geometry, self.pages.slot_words
        rows, sinks = g.words + 1, self.policy.sinks
        random = np.random.default_rng(0)
        budget = self.policy.budget
        for blocks in self.cache.block_table.numpy():
            for head in range(g.num_kv_heads):
                here = np.zeros((rows, len(blocks) * g.block_size), np.int32)
                here[:-1] = random.integers(-(2**31), 2**31, here[:-1].shape)
                if self.policy.votes:  # norms and votes are float32
                    floats = random.random((2, here.shape[1]), np.float32) + 1e-3
                    here[-3:-1] = floats.view(np.int32)
                old = random.permutation(position - sinks)[: budget - sinks] + sinks
                here[-1, :budget] = np.concatenate([np.arange(sinks), old])
                tail[blocks, head] = here.reshape(rows, len(blocks), -1).swapaxes(0, 1)

    def plan(self, starts: list[int], counts: list[int], prompt_len: int) -> list[Step]:
        """The rounds of an engine step.

        Args:
            starts: Tokens of each request computed before.
            counts: Tokens of each in this step; rows follow each other.
            prompt_len: Length of every prompt.

        """
        lens = [start + count for start, count in zip(starts, counts, strict=True)]
        rounds = cut_step(
            self.policy,
            np.array([0, *counts]).cumsum(),
            np.array(lens),
            np.full(len(lens), prompt_len),
            Budgets.of(self.policy, len(lens), {}),
        )
        steps = []
        for pieces in rounds:
            attention = Attention(
                self.cache,
                pieces.request.tolist(),
                pieces.count.tolist(),
                pieces.live.tolist(),
            )
            arrays = round_arrays(pieces)
            rows = arrays["token_rows"]
            if rows[-1] - rows[0] + 1 != len(rows):
                raise ValueError("rounds of several requests must be one token each")
            steps.append(Step(arrays, attention, slice(rows[0], rows[-1] + 1)))
        return steps

    def write(
        self, step: Step, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Hash, evict, write: q [T, Hq, D], k and v [T, Hkv, D]."""
        arrays = step.arrays
        launch.write_tokens(
            self.pages.elements,
            self.pages.tail,
            addresses(q, k, v),
            arrays["token_rows"],
            arrays["positions"],
            arrays["slots"],
            arrays["evict"],
            arrays["recent"],
            arrays["requests"],
            *self._common,
        )

    def reduce(
        self, step: Step, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Cut segments that are complete back to the budget."""
        if len(step.arrays["replay"]):
            launch.replay_segments(
                self.pages.elements,
                self.pages.tail,
                addresses(q, k, v),
                step.arrays["replay"],
                *self._common,
            )
