"""Patches where an engine learns what its layers' caches ask for, and sizes the pool.

Where: ``Worker.get_kv_cache_spec`` (vllm/v1/worker/gpu_worker.py, also the CPU's), as
only a worker sees a layer beside its backend, and its model; and the name
``get_kv_cache_configs`` in ``vllm/v1/engine/core.py``, called once with the specs of
all workers. Why then: the model is loaded; after the latter the pool's size is final,
as is the length with ``--max-model-len auto``, and no request has been admitted.

Upstream fix: patches/*/engine_core.patch, ``KVCacheSpecRegistry.hooks``.
"""

from __future__ import annotations

import functools
from typing import Any


class PolicyHooks:
    """The policy's part in sizing a pool."""

    def check_layers(self, vllm_config: Any, specs: Any, model: Any) -> None:
        """Refuse layers that the policy did not reach: `cache.coverage`.

        On a GPU ballots are told where the model ends: `attention.gpu.fork`.
        """
        from vllm.config import CompilationMode

        from hashevict_vllm import host
        from hashevict_vllm.cache.coverage import check_layers
        from hashevict_vllm.config import policy_of

        check_layers(vllm_config, specs)
        # Hooks would be compiled with a model that is compiled as a whole.
        whole = CompilationMode.STOCK_TORCH_COMPILE
        compiled = vllm_config.compilation_config.mode == whole
        enabled = policy_of(vllm_config.additional_config).enabled
        if enabled and not compiled and not host.on_cpu():
            from hashevict_vllm.attention.gpu.fork import join_after

            join_after(model)

    def check_model(self, vllm_config: Any, specs: Any) -> None:
        """Refuse a model of which no layer is bounded: `cache.coverage`."""
        from hashevict_vllm.cache.coverage import check_model

        check_model(vllm_config, specs)

    def finish(self, vllm_config: Any, kv_cache_configs: Any) -> None:
        """Shares of the final length, room for it, a line on what the pool buys."""
        from hashevict_vllm.cache.capacity import check_full, log_capacity
        from hashevict_vllm.cache.late import resolve_again

        resolve_again(vllm_config, kv_cache_configs)
        check_full(vllm_config, kv_cache_configs[0])
        log_capacity(vllm_config, kv_cache_configs)


def in_vllm() -> bool:
    """Whether vLLM asks plugins about the specs of layers."""
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    return hasattr(KVCacheSpecRegistry, "hooks")


def apply() -> None:
    """Patch once per process."""
    from vllm.v1.engine import core
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
    from vllm.v1.worker.gpu_worker import Worker

    if in_vllm():
        hooks = KVCacheSpecRegistry.hooks
        if not any(isinstance(hook, PolicyHooks) for hook in hooks):
            hooks.append(PolicyHooks())
    elif not hasattr(core.get_kv_cache_configs, "hashevict_stock"):
        hook = PolicyHooks()
        core.get_kv_cache_configs = _core(core.get_kv_cache_configs, hook)
        Worker.get_kv_cache_spec = _worker(Worker.get_kv_cache_spec, hook)


def _core(stock: Any, hook: PolicyHooks) -> Any:
    @functools.wraps(stock)
    def get_kv_cache_configs(vllm_config: Any, kv_cache_specs: Any, *rest: Any) -> Any:
        hook.check_model(vllm_config, kv_cache_specs)
        configs = stock(vllm_config, kv_cache_specs, *rest)
        hook.finish(vllm_config, configs)
        return configs

    get_kv_cache_configs.hashevict_stock = stock  # type: ignore[attr-defined]
    return get_kv_cache_configs


def _worker(stock: Any, hook: PolicyHooks) -> Any:
    @functools.wraps(stock)
    def get_kv_cache_spec(self: Any) -> Any:
        specs = stock(self)
        hook.check_layers(self.vllm_config, specs, self.get_model())
        return specs

    return get_kv_cache_spec
