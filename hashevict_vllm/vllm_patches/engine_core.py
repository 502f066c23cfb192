"""Patches `vllm.v1.engine.core`: the log says the capacity in plain words.

Where: the name ``update_kv_cache_capacity`` in ``vllm/v1/engine/core.py``, which logs
stock vLLM's own capacity line once per engine. Why then: the pool's size is final, and
no request has been admitted.

Upstream fix: patches/*/engine_core.patch, ``KVCacheSpec.describe_capacity``.
"""

from __future__ import annotations

from typing import Any


def in_vllm() -> bool:
    """Whether vLLM asks a spec for its capacity line."""
    from vllm.v1.kv_cache_interface import KVCacheSpec

    return hasattr(KVCacheSpec, "describe_capacity")


def apply() -> None:
    """Patch once per process; `BudgetedAttentionSpec` has the method already."""
    from vllm.v1.engine import core

    if in_vllm():
        return
    stock = core.update_kv_cache_capacity
    if hasattr(stock, "hashevict_stock"):
        return

    def update_kv_cache_capacity(vllm_config: Any, kv_cache_config: Any) -> None:
        stock(vllm_config, kv_cache_config)
        from hashevict_vllm.cache.capacity import log_capacity

        log_capacity(vllm_config, kv_cache_config)

    update_kv_cache_capacity.hashevict_stock = stock  # type: ignore[attr-defined]
    core.update_kv_cache_capacity = update_kv_cache_capacity
