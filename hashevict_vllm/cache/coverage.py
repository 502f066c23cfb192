"""That a policy reached the layers it is for, once the model has been loaded.

A configuration says which layers a model has, a loaded model which backend each uses:
a layer may bring its own, and then nothing has bounded it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from hashevict_vllm.cache.spec import BudgetedAttentionSpec
from hashevict_vllm.config import KVPolicyError, policy_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_layers(vllm_config: VllmConfig, specs: Mapping[str, KVCacheSpec]) -> None:
    """Refuse a worker's layers of full attention that a policy did not reach.

    Args:
        vllm_config: The worker's configuration, whose context holds the layers.
        specs: What each of its layers asks for.

    Raises:
        KVPolicyError: With the first such layer and its backend.

    """
    if not policy_of(vllm_config.additional_config).enabled:
        return
    full = [n for n, spec in specs.items() if isinstance(spec, FullAttentionSpec)]
    if not full:
        return
    layer = vllm_config.compilation_config.static_forward_context[full[0]]
    backend = layer.get_attn_backend()
    raise KVPolicyError(
        f"--kv-policy: {len(full)} of {len(specs)} attention layers, {full[0]} first, "
        f"bring their own attention backend ({backend.get_name()}), which a KV policy "
        "cannot bound; use --kv-policy full."
    )


def check_model(
    vllm_config: VllmConfig, specs: Iterable[Mapping[str, KVCacheSpec]]
) -> None:
    """Refuse a model of which no layer, on any worker, is bounded by its policy.

    Args:
        vllm_config: The engine's configuration.
        specs: What the layers of each worker ask for.

    Raises:
        KVPolicyError: If none of them is budgeted.

    """
    if not policy_of(vllm_config.additional_config).enabled:
        return
    found = [spec for worker in specs for spec in worker.values()]
    if any(isinstance(spec, BudgetedAttentionSpec) for spec in found):
        return
    kinds = ", ".join(sorted({type(spec).__name__ for spec in found})) or "none at all"
    raise KVPolicyError(
        f"--kv-policy: no layer of {vllm_config.model_config.architecture} keeps a KV "
        f"cache that a policy could bound (it has {kinds}); use --kv-policy full."
    )
