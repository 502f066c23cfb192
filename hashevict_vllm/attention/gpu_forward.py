"""One layer's forward on a GPU: sign, write (evicting where full), attend, reduce.

Mixed into the inner backend's implementation, whose own ``forward`` does the attention
over the live slots. Kernels take strides, so it does not matter which backend it is.
"""

from __future__ import annotations

import torch
from vllm.v1.attention.backend import AttentionLayer

from hashevict_vllm.attention.gpu_metadata import DeviceMetadata, DeviceRound
from hashevict_vllm.attention.unshared import UnsharedCacheMixin
from hashevict_vllm.config import ResolvedKVPolicy
from hashevict_vllm.kernels.triton import ops
from hashevict_vllm.kernels.triton.pages import DevicePages, view_pages
from hashevict_vllm.policies import make_rule


class DeviceImplMixin(UnsharedCacheMixin):
    """Mixed into the inner implementation; `policy` is set on the subclass."""

    policy: ResolvedKVPolicy
    kv_cache_dtype: str
    _pages: DevicePages | None = None
    _pages_key: tuple[int, int] | None = None

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: DeviceMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sign, then round by round write, attend and reduce.

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
            return output.fill_(0)
        tokens, constants = attn_metadata.num_actual_tokens, attn_metadata.constants
        query, key, value = query[:tokens], key[:tokens], value[:tokens]
        rule = list(constants.rule)
        pages = self._pages_of(kv_cache)
        signed = (constants.signatures[:tokens], constants.squares[:tokens])
        if constants.rule.signs:
            ops.sign(query, key, constants.projection, *signed, rule)
        cache = (pages.k, pages.v, pages.tail)
        votes = (
            constants.scale,
            constants.factor,
            constants.decay,
            rule,
            constants.bound,
        )
        projection, slots = constants.projection, constants.slots[:tokens]
        table, scales = attn_metadata.block_table, self._scales(layer)
        for step in attn_metadata.rounds:
            ops.write(
                query,
                key,
                value,
                *signed,
                step.pieces,
                step.token_piece,
                table,
                *cache,
                *scales,
                projection,
                slots,
                *votes,
                step.scans,
            )
            if constants.rule.votes:
                ops.describe(
                    step.pieces,
                    step.token_piece,
                    slots,
                    table,
                    pages.k,
                    scales[0],
                    pages.tail,
                    projection,
                    rule,
                )
            self._attend(layer, query, key, value, kv_cache, step, output, output_scale)
            if step.reduced is not None:
                ops.mark(
                    query,
                    signed[0],
                    step.reduced,
                    table,
                    pages.k,
                    scales[0],
                    pages.tail,
                    projection,
                    *votes,
                )
                ops.compact(step.reduced, table, *cache, rule, constants.bound)
        return output

    def _attend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        step: DeviceRound,
        output: torch.Tensor,
        output_scale: torch.Tensor | None,
    ) -> None:
        """The stock attention kernel over one round's rows."""
        inner_forward = super().forward  # type: ignore[misc]
        if step.rows is None:
            inner_forward(
                layer, query, key, value, kv_cache, step.inner, output, output_scale
            )
            return
        picked = query[step.rows]
        result = torch.empty_like(picked, dtype=output.dtype)
        inner_forward(
            layer,
            picked,
            key[step.rows],
            value[step.rows],
            kv_cache,
            step.inner,
            result,
            output_scale,
        )
        output[step.rows] = result

    @property
    def _fp8_dtype(self) -> torch.dtype | None:
        """What the bytes of a quantised cache mean; None for other caches."""
        if not self.kv_cache_dtype.startswith("fp8"):
            return None
        if self.kv_cache_dtype == "fp8_e5m2":
            return torch.float8_e5m2
        return torch.float8_e4m3fn

    def _scales(
        self, layer: AttentionLayer
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What K and V are divided by, on the device; None for caches not quantised."""
        if self._fp8_dtype is None:
            return None, None
        return layer._k_scale, layer._v_scale

    def _pages_of(self, kv_cache: torch.Tensor) -> DevicePages:
        """Views of the layer's pages, made anew if vLLM has bound another cache."""
        bound = (kv_cache.data_ptr(), kv_cache.shape[0])
        if self._pages is None or self._pages_key != bound:
            words = make_rule(self.policy).words
            self._pages = view_pages(kv_cache, words, self._fp8_dtype)
            self._pages_key = bound
        return self._pages
