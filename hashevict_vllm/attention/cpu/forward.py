"""One layer's forward: write (evicting where full), attend, reduce.

Mixed into the inner backend's implementation, whose own ``forward`` does the attention
over the live slots and whose own cache-update op tells where elements of a page lie.
"""

from __future__ import annotations

import torch
from vllm.v1.attention.backend import AttentionLayer

from hashevict_vllm.attention.cpu.metadata import BudgetedMetadata, Round
from hashevict_vllm.attention.unshared import UnsharedCacheMixin
from hashevict_vllm.cache.page import LayerPages
from hashevict_vllm.kernels.cpu import launch
from hashevict_vllm.kernels.cpu.tokens import addresses, with_whole_rows
from hashevict_vllm.policies import make_rule
from hashevict_vllm.resolved import ResolvedKVPolicy


class BudgetedImplMixin(UnsharedCacheMixin):
    """Mixed into the inner implementation; `policy` is set on the subclass."""

    policy: ResolvedKVPolicy
    _pages: LayerPages | None = None
    _pages_key: tuple[int, int] | None = None

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: BudgetedMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write, attend and reduce, round by round.

        Args:
            layer: The attention layer.
            query: [T, Hq, D] after RoPE.
            key: [T, Hkv, D] after RoPE.
            value: [T, Hkv, D].
            kv_cache: [B, Hkv, N, 2D], pages with a tail.
            attn_metadata: The step's plan; None while vLLM profiles memory.
            output: [T, Hq, D], written in place.
            output_scale: As the inner backend.
            output_block_scale: As the inner backend.

        Returns:
            ``output``.

        """
        if attn_metadata is None:
            return output
        pages, constants = self._pages_of(kv_cache), attn_metadata.constants
        q, k, v = with_whole_rows(query), with_whole_rows(key), with_whole_rows(value)
        places = addresses(q, k, v)
        common = (
            attn_metadata.block_table,
            constants.projection,
            constants.k_map,
            constants.v_map,
            pages.kernel_geometry,
            constants.rule,
            constants.strengths,
            constants.team,
        )
        for step in attn_metadata.rounds:
            launch.write_tokens(
                pages.elements,
                pages.tail,
                places,
                step.token_rows,
                step.positions,
                step.slots,
                step.evict,
                step.requests,
                *common,
            )
            self._attend(layer, query, key, value, kv_cache, step, output)
            if len(step.replay):
                launch.replay_segments(
                    pages.elements,
                    pages.tail,
                    places,
                    step.replay,
                    *common,
                    self.policy.budget,
                )
        return output

    def _attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        step: Round,
        output: torch.Tensor,
    ) -> None:
        """The stock attention kernel over one round's rows."""
        inner_forward = super().forward  # type: ignore[misc]
        if step.rows is None:
            inner_forward(layer, query, key, value, kv_cache, step.inner, output)
        elif step.span is not None:
            rows = step.span
            inner_forward(
                layer,
                query[rows],
                key[rows],
                value[rows],
                kv_cache,
                step.inner,
                output[rows],
            )
        else:
            picked = query[step.rows]
            result = torch.empty_like(picked)
            inner_forward(
                layer,
                picked,
                key[step.rows],
                value[step.rows],
                kv_cache,
                step.inner,
                result,
            )
            output[step.rows] = result

    def _pages_of(self, kv_cache: torch.Tensor) -> LayerPages:
        """Raw views of the layer's pages, made anew if vLLM has bound another cache."""
        bound = (kv_cache.data_ptr(), kv_cache.shape[0])
        if self._pages is None or self._pages_key != bound:
            rule = make_rule(self.policy)
            self._pages = LayerPages(kv_cache, rule.words, rule.projected_bits)
            self._pages_key = bound
        return self._pages
