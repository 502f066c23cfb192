"""One layer's forward on a GPU: sign, then what `attention.impl` says of every round.

Kernels take strides, so it does not matter which inner backend it is.

With an fp8 cache the stock layer quantises queries before it calls its implementation.
Here it must not: rules read the query as the model computed it, and votes know nothing
of its scale. `attend` quantises instead, in the same way, for backends that want that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    QuantKey,
    kFp8StaticTensorSym,
)
from vllm.v1.attention.backend import AttentionLayer

from hashevict_vllm.attention.gpu.metadata import DeviceRound
from hashevict_vllm.attention.impl import BudgetedImpl, LayerStep
from hashevict_vllm.attention.inner import InnerBackend
from hashevict_vllm.kernels.triton import ops
from hashevict_vllm.kernels.triton.pages import DevicePages, view_pages
from hashevict_vllm.policies import make_rule


class DeviceImplMixin(BudgetedImpl):
    """Mixed into the inner implementation."""

    needs: InnerBackend = InnerBackend()
    kv_cache_dtype: str
    supports_quant_query_input: bool
    _query_quant: QuantFP8 | None = None
    _pages: DevicePages

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
        """Sign, then round by round write, attend and reduce."""
        tokens, constants = step.metadata.num_actual_tokens, step.metadata.constants
        q, k, v = (x[:tokens] for x in (step.query, step.key, step.value))
        step = step._replace(query=q, key=k, value=v)
        is_new = self.bind(step.kv_cache)
        if constants.rule.signs:
            ops.sign(
                step.query,
                step.key,
                constants.projection,
                *constants.signed(tokens),
                list(constants.rule),
            )
        if is_new:
            self._load_kernels(step)
        quantised = self._with_quantised_queries(step)
        for part in step.metadata.rounds:
            self._write(step, part)
            self.attend(quantised, part.rows, part.inner())
            if part.reduced is not None:
                self._reduce(step, part.reduced)

    def _with_quantised_queries(self, step: LayerStep) -> LayerStep:
        """What attention takes, where the inner ``forward`` wants such queries."""
        if self._query_quant is None:
            return step
        query, _ = self._query_quant(step.query.flatten(1), step.layer._q_scale)
        return step._replace(query=query.view(step.query.shape))

    def _write(self, step: LayerStep, part: DeviceRound) -> None:
        """Write one round's tokens, evicting where the budget is full."""
        constants, pages = step.metadata.constants, self._pages
        tokens, rule = len(step.query), list(constants.rule)
        table, slots = step.metadata.block_table, constants.slots[:tokens]
        scales = self._scales(step.layer)
        ops.write(
            step.query,
            step.key,
            step.value,
            *constants.signed(tokens),
            part.pieces,
            part.token_piece,
            table,
            pages.k,
            pages.v,
            pages.tail,
            *scales,
            constants.projection,
            slots,
            constants.scale,
            constants.factor,
            constants.decay,
            rule,
            constants.bound,
            part.scans,
        )
        if constants.rule.votes:
            ops.describe(
                part.pieces,
                part.token_piece,
                slots,
                table,
                pages.k,
                scales[0],
                pages.tail,
                constants.projection,
                rule,
            )

    def _reduce(self, step: LayerStep, pieces: torch.Tensor) -> None:
        """Reduce the live sets of requests whose segment is over."""
        constants, pages = step.metadata.constants, self._pages
        table, rule = step.metadata.block_table, list(constants.rule)
        ops.mark(
            step.query,
            constants.signed(len(step.query))[0],
            pieces,
            table,
            pages.k,
            self._scales(step.layer)[0],
            pages.tail,
            constants.projection,
            constants.scale,
            constants.factor,
            constants.decay,
            rule,
            constants.bound,
        )
        cache = (pages.k, pages.v, pages.tail)
        ops.compact(pieces, table, *cache, rule, constants.bound)

    def _load_kernels(self, step: LayerStep) -> None:
        """Compile what only prompts need, before a request waits for it: no-ops."""
        part = step.metadata.rounds[0]
        nothing = torch.zeros_like(part.pieces[:1])
        nobody = torch.full_like(part.token_piece, -1)
        idle = replace(part, pieces=nothing, token_piece=nobody, scans=False)
        self._write(step, idle)
        self._reduce(step, nothing)

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

    def view_pages(self, kv_cache: torch.Tensor) -> DevicePages:
        """The layer's pages, with their strides."""
        return view_pages(kv_cache, make_rule(self.policy).words, self._fp8_dtype)
