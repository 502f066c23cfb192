"""One layer's forward on a GPU: write (evicting where full), attend, vote, reduce.

Mixed into the inner backend's implementation, whose own ``forward`` does the attention
over the live slots. Kernels take strides, so it does not matter which backend it is.

With an fp8 cache the stock layer quantises queries before it calls its implementation.
Here it must not: rules read the query as the model computed it, and votes know nothing
of its scale. `_attend` quantises instead, in the same way, for backends that want that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    QuantKey,
    kFp8StaticTensorSym,
)
from vllm.v1.attention.backend import AttentionLayer

from hashevict_vllm.attention.gpu.launches import Launches
from hashevict_vllm.attention.gpu.metadata import DeviceMetadata, DeviceRound
from hashevict_vllm.attention.inner import InnerBackend
from hashevict_vllm.attention.unshared import UnsharedCacheMixin
from hashevict_vllm.kernels.triton.arguments import Page, Tokens
from hashevict_vllm.kernels.triton.pages import view_pages
from hashevict_vllm.policies import make_rule
from hashevict_vllm.resolved import ResolvedKVPolicy


@dataclass(frozen=True)
class _Step:
    """What all rounds of one layer's forward share; as `DeviceImplMixin.forward`."""

    layer: AttentionLayer
    tokens: Tokens
    kv_cache: torch.Tensor


class DeviceImplMixin(UnsharedCacheMixin):
    """Mixed into the inner implementation; `policy` is set on the subclass."""

    policy: ResolvedKVPolicy
    needs: InnerBackend = InnerBackend()
    kv_cache_dtype: str
    supports_quant_query_input: bool
    _query_quant: QuantFP8 | None = None
    _page: Page | None = None
    _pages_key: tuple[int, int] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As the inner implementation; the layer will not quantise queries."""
        super().__init__(*args, **kwargs)
        if self._fp8_dtype is not None and self.supports_quant_query_input:
            if self.needs.takes_fp8_queries:
                self._query_quant = QuantFP8(
                    static=True, group_shape=GroupShape.PER_TENSOR
                )
            self.supports_quant_query_input = False  # read by Attention.__init__

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """As the inner implementation, which from now on gets quantised queries.

        Args:
            act_dtype: As the inner implementation.

        """
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]
        if self._query_quant is not None:
            # FlashAttention's forward asks whether to pass the queries' scale on.
            self.supports_quant_query_input = True

    def fused_output_quant_supported(self, quant_key: QuantKey) -> bool:
        """Only what `_attend` passes on: one scale for the whole output.

        Args:
            quant_key: How the layer behind attention wants its input.

        """
        inner = super().fused_output_quant_supported(quant_key)  # type: ignore[misc]
        return quant_key == kFp8StaticTensorSym and inner

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
        """Round by round write, attend, vote and reduce (`launches`).

        Args:
            layer: The attention layer.
            query: [T, Hq, D] after RoPE.
            key: [T, Hkv, D] after RoPE.
            value: [T, Hkv, D].
            kv_cache: [B, Hkv, N, 2D], pages with a tail.
            attn_metadata: The step's plan; None while vLLM profiles memory, of which
                the inner implementation may want some.
            output: [T, Hq, D], written in place.
            output_scale: As the inner backend.
            output_block_scale: Never given, see `fused_output_quant_supported`.

        Returns:
            ``output``.

        """
        if attn_metadata is None:
            return super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, None, output
            )
        num, constants = attn_metadata.num_actual_tokens, attn_metadata.constants
        is_new = self._bind(layer, kv_cache)
        assert self._page is not None
        tokens = Tokens.of(query[:num], key[:num], value[:num])
        step = _Step(layer, tokens, kv_cache)
        table = attn_metadata.block_table
        launches = Launches(tokens, self._page, table, constants)
        constants.fork.join()
        launches.sign()
        if is_new:
            launches.load_kernels(attn_metadata.rounds[0])
        for part in attn_metadata.rounds:
            launches.write(part)
            self._attend(step, part, output, output_scale)
            launches.finish(part)
        if layer is constants.last:
            constants.fork.join()  # within the CUDA graph that it is a branch of
        return output

    def _attend(
        self,
        step: _Step,
        part: DeviceRound,
        output: torch.Tensor,
        output_scale: torch.Tensor | None,
    ) -> None:
        """The stock attention kernel over one round's rows."""
        inner_forward, inner = super().forward, part.inner()  # type: ignore[misc]
        query, rows = step.tokens.q, part.rows
        if self._query_quant is not None:
            quantised, _ = self._query_quant(query.flatten(1), step.layer._q_scale)
            query = quantised.view(query.shape)
        if rows is None:
            inner_forward(
                step.layer,
                query,
                step.tokens.k,
                step.tokens.v,
                step.kv_cache,
                inner,
                output,
                output_scale,
            )
            return
        result = torch.empty_like(output[rows])
        inner_forward(
            step.layer,
            query[rows],
            step.tokens.k[rows],
            step.tokens.v[rows],
            step.kv_cache,
            inner,
            result,
            output_scale,
        )
        output[rows] = result

    @property
    def _fp8_dtype(self) -> torch.dtype | None:
        """What the bytes of a quantised cache mean; None for other caches."""
        return torch.float8_e4m3fn if self.kv_cache_dtype.startswith("fp8") else None

    def _scales(
        self, layer: AttentionLayer
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What K and V are divided by, on the device; None for caches not quantised."""
        if self._fp8_dtype is None:
            return None, None
        return layer._k_scale, layer._v_scale

    def _bind(self, layer: AttentionLayer, kv_cache: torch.Tensor) -> bool:
        """View the layer's pages; whether vLLM has bound another cache than before."""
        bound = (kv_cache.data_ptr(), kv_cache.shape[0])
        if self._page is not None and self._pages_key == bound:
            return False
        words = make_rule(self.policy).words
        pages = view_pages(kv_cache, words, self._fp8_dtype)
        self._page = Page.of(pages, *self._scales(layer))
        self._pages_key = bound
        return True
