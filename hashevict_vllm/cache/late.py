"""``--max-model-len auto``: a policy's shares are of the length that vLLM settles on.

vLLM shrinks the length once it knows the pool, when layers already have their specs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import KVCacheConfig, UniformTypeKVCacheSpecs

from hashevict_vllm.cache.spec import BudgetedAttentionSpec
from hashevict_vllm.config import policy_of
from hashevict_vllm.host import resolve

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def resolve_again(
    vllm_config: VllmConfig, kv_cache_configs: list[KVCacheConfig]
) -> None:
    """Give the specs of all workers the policy at the final ``max_model_len``.

    Workers read the policy from the spec that this sends them. Page sizes do not depend
    on what changes.

    Raises:
        KVPolicyError: As `KVPolicyConfig.resolve`, when the shorter length leaves a
            share too small.

    """
    model = vllm_config.model_config
    config = policy_of(vllm_config.additional_config)
    if model.original_max_model_len != -1 or not config.enabled:
        return
    policy = resolve(config, vllm_config)

    def final(spec: Any) -> Any:
        if isinstance(spec, BudgetedAttentionSpec):
            return replace(spec, policy=policy)
        if isinstance(spec, UniformTypeKVCacheSpecs):
            specs = {name: final(one) for name, one in spec.kv_cache_specs.items()}
            return replace(spec, kv_cache_specs=specs)
        return spec

    for kv_cache_config in kv_cache_configs:
        for group in kv_cache_config.kv_cache_groups:
            group.kv_cache_spec = final(group.kv_cache_spec)
