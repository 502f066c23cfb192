"""What the forward of a budgeted layer is on every device.

Mixed into the inner backend's implementation, whose own ``forward`` does the attention
over the live slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from vllm.v1.attention.backend import AttentionLayer

from hashevict_vllm.config import KVPolicyError
from hashevict_vllm.resolved import ResolvedKVPolicy


class LayerStep(NamedTuple):
    """What all rounds of one layer's forward share; as `BudgetedImpl.forward`."""

    layer: AttentionLayer
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kv_cache: torch.Tensor
    metadata: Any
    output: torch.Tensor
    output_scale: torch.Tensor | None


class BudgetedImpl:
    """Base of each device's mixin; `policy` is set on the wrapped implementation."""

    policy: ResolvedKVPolicy
    _pages: Any = None
    _pages_key: tuple[int, int] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As the inner implementation.

        Raises:
            KVPolicyError: For a layer that reads another layer's KV cache.

        """
        super().__init__(*args, **kwargs)
        if getattr(self, "kv_sharing_target_layer_name", None) is not None:
            raise KVPolicyError(
                "--kv-policy: a layer of this model shares the KV cache of another "
                "(cross-layer KV sharing), which would need that layer's evictions."
            )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Round by round: write (evicting where full), attend, reduce.

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
            output_block_scale: Not passed on.

        Returns:
            ``output``.

        """
        if attn_metadata is None:
            return super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, None, output
            )
        tensors = (query, key, value, kv_cache)
        self.run(LayerStep(layer, *tensors, attn_metadata, output, output_scale))
        return output

    def run(self, step: LayerStep) -> None:
        """All rounds of a step on this device."""
        raise NotImplementedError

    def view_pages(self, layer: AttentionLayer, kv_cache: torch.Tensor) -> Any:
        """The layer's pages, as this device's kernels take them."""
        raise NotImplementedError

    def bind(self, layer: AttentionLayer, kv_cache: torch.Tensor) -> bool:
        """View the layer's pages; whether vLLM has bound another cache than before."""
        bound = (kv_cache.data_ptr(), kv_cache.shape[0])
        if self._pages_key == bound:
            return False
        self._pages, self._pages_key = self.view_pages(layer, kv_cache), bound
        return True

    def attend(
        self, step: LayerStep, rows: torch.Tensor | slice | None, inner: Any
    ) -> None:
        """The stock attention kernel over one round's rows.

        Args:
            step: The layer's step.
            rows: Of q, k, v and output; None for all.
            inner: The inner backend's metadata for these rows.

        """
        _, query, key, value, _, _, output, _ = step
        if rows is not None:
            query, key, value = query[rows], key[rows], value[rows]
            if isinstance(rows, slice):
                output = output[rows]
            else:
                output = output.new_empty((len(rows), *output.shape[1:]))
        super().forward(  # type: ignore[misc]
            step.layer,
            query,
            key,
            value,
            step.kv_cache,
            inner,
            output,
            step.output_scale,
        )
        if isinstance(rows, torch.Tensor):
            step.output[rows] = output
