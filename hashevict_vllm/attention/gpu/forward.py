"""One layer's forward on a GPU: write (evicting where full), attend, vote, reduce.

Kernels take strides, so it does not matter which inner backend it is.

With an fp8 cache the stock layer quantises queries before it calls its implementation.
Here it must not: rules read the query as the model computed it, and votes know nothing
of its scale. `attend` quantises instead, in the same way, for backends that want that.
"""

from __future__ import annotations

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
from hashevict_vllm.attention.impl import BudgetedImpl, LayerStep
from hashevict_vllm.attention.inner import InnerBackend
from hashevict_vllm.kernels.pages import view_pages
from hashevict_vllm.kernels.triton.arguments import Page, Tokens
from hashevict_vllm.policies import make_rule


class DeviceImplMixin(BudgetedImpl):
    """Mixed into the inner implementation."""

    needs: InnerBackend = InnerBackend()
    kv_cache_dtype: str
    supports_quant_query_input: bool
    _query_quant: QuantFP8 | None = None
    _pages: Page

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
        """Only what `attend` passes on: one scale for the whole output.

        Args:
            quant_key: How the layer behind attention wants its input.

        """
        inner = super().fused_output_quant_supported(quant_key)  # type: ignore[misc]
        return quant_key == kFp8StaticTensorSym and inner

    def run(self, step: LayerStep) -> None:
        """Round by round write, attend, vote and reduce (`launches`)."""
        num, constants = step.metadata.num_actual_tokens, step.metadata.constants
        q, k, v = (x[:num] for x in (step.query, step.key, step.value))
        step = step._replace(query=q, key=k, value=v)
        is_new = self.bind(step.layer, step.kv_cache)
        tokens, table = Tokens.of(q, k, v), step.metadata.block_table
        launches = Launches(tokens, self._pages, table, constants)
        constants.fork.join()
        launches.sign()
        if is_new:
            launches.load_kernels(step.metadata.rounds[0])
        quantised = self._with_quantised_queries(step)
        for part in step.metadata.rounds:
            launches.write(part)
            self.attend(quantised, part.rows, part.inner())
            launches.finish(part)
        if step.layer is constants.last and not constants.fork.ends_with_model:
            constants.fork.join()  # within the CUDA graph that it is a branch of

    def _with_quantised_queries(self, step: LayerStep) -> LayerStep:
        """What attention takes, where the inner ``forward`` wants such queries."""
        if self._query_quant is None:
            return step
        query, _ = self._query_quant(step.query.flatten(1), step.layer._q_scale)
        return step._replace(query=query.view(step.query.shape))

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

    def view_pages(self, layer: AttentionLayer, kv_cache: torch.Tensor) -> Page:
        """The layer's pages, with their strides and scales."""
        words = make_rule(self.policy).words
        pages = view_pages(kv_cache, words, self._fp8_dtype)
        return Page.of(pages, *self._scales(layer))
