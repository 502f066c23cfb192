"""The xformers backend's forward: gather the live slots, attend to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from hashevict_vllm.attention.xformers.attend import attend, gather
from hashevict_vllm.attention.xformers.calls import SCRATCH_SLOTS
from hashevict_vllm.attention.xformers.metadata import XformersMetadata
from hashevict_vllm.attention.xformers.support import CUSTOM
from hashevict_vllm.config import KVPolicyError
from hashevict_vllm.plan import most_slots

if TYPE_CHECKING:
    from hashevict_vllm.config import ResolvedKVPolicy


def _refuse(feature: str) -> KVPolicyError:
    return KVPolicyError(
        f"--attention-backend: {CUSTOM} (xformers) has no {feature}, which this model "
        "wants; name another backend."
    )


class XformersImpl(AttentionImpl[XformersMetadata]):
    """Attention of one layer; `policy` is set by the wrapper (`wrap_backend`)."""

    policy: ResolvedKVPolicy | None = None

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **features: Any,
    ) -> None:
        """As vLLM's other implementations.

        Raises:
            KVPolicyError: Without a policy, or for a feature that xformers or this
                path does not have and for which vLLM has no ``supports_`` hook.

        """
        if self.policy is None:
            raise KVPolicyError(
                f"--attention-backend: {CUSTOM} is hashevict-vllm's path to xformers, "
                "which reads caches that a KV policy bounds; set --kv-policy or name "
                "another backend."
            )
        if alibi_slopes is not None:
            raise _refuse("ALiBi")
        if sliding_window is not None:
            raise _refuse("sliding window")
        if logits_soft_cap:
            raise _refuse("soft cap of logits")
        for name, value in features.items():
            if value is not None and value is not False:
                raise _refuse(f"'{name}'")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.num_queries_per_kv = num_heads // self.num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self._scratch_slots = max(SCRATCH_SLOTS, self._longest())

    def _longest(self) -> int:
        """Most live slots of a request, where vLLM's configuration is at hand."""
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        if self.policy is None or config is None or config.model_config is None:
            return 0
        return most_slots(self.policy, config.model_config.max_model_len)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: XformersMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to the live slots, among which the new tokens' already are.

        Arguments as `hashevict_vllm.attention.impl.BudgetedImpl.forward`, which calls
        this; ``key`` and ``value`` have been written, and are unused like ``layer``.
        Scales of the output are never given, see ``fused_output_quant_supported``.
        """
        if attn_metadata is None:
            # Once, so that vLLM leaves room for what `gather` takes.
            shape = (self._scratch_slots, self.num_kv_heads, 2 * self.head_size)
            torch.empty(shape, dtype=query.dtype, device=query.device)
            return output.fill_(0)
        for call in attn_metadata.calls:
            k, v = gather(kv_cache, call)
            output[call.rows] = attend(query[call.rows], k, v, call, self.scale)
        return output
