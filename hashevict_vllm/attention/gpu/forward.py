"""One layer's forward on a GPU: sign, write (evicting where full), attend, reduce.

Mixed into the inner backend's implementation, whose own ``forward`` does the attention
over the live slots. Kernels take strides, so it does not matter which backend it is.

With an fp8 cache the stock layer quantises queries before it calls its implementation.
Here it must not: rules read the query as the model computed it, and votes know nothing
of its scale. `_attend` quantises instead, in the same way, for backends that want that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    QuantKey,
    kFp8StaticTensorSym,
)
from vllm.v1.attention.backend import AttentionLayer

from hashevict_vllm.attention.gpu.metadata import DeviceMetadata, DeviceRound
from hashevict_vllm.attention.inner import InnerBackend
from hashevict_vllm.attention.unshared import UnsharedCacheMixin
from hashevict_vllm.kernels.triton import ops
from hashevict_vllm.kernels.triton.arguments import Page, Step, Tokens
from hashevict_vllm.kernels.triton.pages import view_pages
from hashevict_vllm.policies import make_rule
from hashevict_vllm.resolved import ResolvedKVPolicy


@dataclass(frozen=True)
class _Step:
    """What all rounds of one layer's forward share.

    Attributes:
        layer: As `DeviceImplMixin.forward`.
        tokens: The step's queries, keys and values.
        kv_cache: As `DeviceImplMixin.forward`.
        page: The same as kernels take it.
        metadata: The step's plan.

    """

    layer: AttentionLayer
    tokens: Tokens
    kv_cache: torch.Tensor
    page: Page
    metadata: DeviceMetadata

    def round(self, pieces: torch.Tensor, token_piece: torch.Tensor | None) -> Step:
        """What one round does, as kernels take it."""
        table, heads = self.metadata.block_table, self.page.tail.shape[1]
        return Step.of(pieces, token_piece, table, heads)


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
        """Sign, then round by round write, attend and reduce.

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
        tokens, constants = attn_metadata.num_actual_tokens, attn_metadata.constants
        is_new = self._bind(layer, kv_cache)
        assert self._page is not None
        step = _Step(
            layer,
            Tokens.of(query[:tokens], key[:tokens], value[:tokens]),
            kv_cache,
            self._page,
            attn_metadata,
        )
        if constants.rule.signs:
            signed = constants.signed(tokens)
            ops.sign(step.tokens, constants.projection, signed, constants.rule)
        if is_new:
            self._load_kernels(step)
        for part in attn_metadata.rounds:
            self._write(step, part)
            self._attend(step, part, output, output_scale)
            if part.reduced is not None:
                self._reduce(step, part.reduced)
        return output

    def _write(self, step: _Step, part: DeviceRound) -> None:
        """Write one round's tokens, evicting where the budget is full."""
        constants, page = step.metadata.constants, step.page
        tokens, rule = len(step.tokens.k), constants.rule
        slots = constants.slots[:tokens]
        args = step.round(part.pieces, part.token_piece)
        ops.write(
            step.tokens,
            constants.signed(tokens),
            args,
            page,
            constants.estimate,
            slots,
            rule,
            constants.bound,
            part.scans,
        )
        if rule.votes:
            ops.describe(args, page, constants.projection, slots, rule)

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

    def _reduce(self, step: _Step, pieces: torch.Tensor) -> None:
        """Reduce the live sets of requests whose segment is over."""
        constants, args = step.metadata.constants, step.round(pieces, None)
        rule, bound = constants.rule, constants.bound
        ops.mark(
            step.tokens,
            constants.signed(len(step.tokens.k)),
            args,
            step.page,
            constants.estimate,
            rule,
            bound,
        )
        ops.compact(args, step.page, rule, bound)

    def _load_kernels(self, step: _Step) -> None:
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
