"""Patches both model runners: copied blocks take their tails along, and no votes.

Where: ``GPUModelRunner._update_states`` of V1 (also the CPU's) and ``update_requests``
of V2, which copy blocks before the forward. Their own
``copy_kv_cache_blocks_inplace`` (vllm/v1/worker/utils.py) drops a page's padding, where
signatures live, and copies the pages of all groups. Why there: the step's blocks are
known, and nothing has read them yet.

Upstream fix: patches/*/block_copies.patch, ``KVCacheSpec.copy_blocks``.
"""

from __future__ import annotations

from typing import Any


def in_vllm() -> bool:
    """Whether vLLM lets a spec copy its blocks."""
    from vllm.v1.kv_cache_interface import KVCacheSpec

    return hasattr(KVCacheSpec, "copy_blocks")


def apply() -> None:
    """Patch both runners once per process."""
    if in_vllm():
        return
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

    for runner, name in ((RunnerV1, "_update_states"), (RunnerV2, "update_requests")):
        stock = getattr(runner, name)
        if not hasattr(stock, "hashevict_stock"):
            setattr(runner, name, _copying(stock))


def _copying(stock: Any) -> Any:
    def method(self: Any, scheduler_output: Any) -> Any:
        copies = scheduler_output.kv_cache_block_copies
        if not copies or not hasattr(copies[0], "keeps_votes"):
            return stock(self, scheduler_output)
        scheduler_output.kv_cache_block_copies = None
        try:
            result = stock(self, scheduler_output)
        finally:
            scheduler_output.kv_cache_block_copies = copies
        copy_blocks(self, copies)
        return result

    method.hashevict_stock = stock  # type: ignore[attr-defined]
    return method


def copy_blocks(runner: Any, copies: Any) -> None:
    """Let the spec of every group copy the pages of its layers.

    Args:
        runner: A model runner of either version.
        copies: `hashevict_vllm.cache.copies.PageCopy` each.

    """
    layers = runner.compilation_config.static_forward_context
    for number, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        own = [copy for copy in copies if copy.group_id == number]
        if not own:
            continue
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        for name in group.layer_names:
            spec = group.kv_cache_spec if specs is None else specs[name]
            spec.copy_blocks(layers[name].kv_cache, own)
