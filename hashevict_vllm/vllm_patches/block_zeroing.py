"""Patches the zeroing of blocks: no layer reads another's metadata as K or V.

Groups of a hybrid model share blocks, and vLLM pads smaller pages to the largest. So
where a budgeted layer keeps signatures and positions, another group may keep K and V;
stale bits of them can be NaN, and kernels multiply slots that they mask by zero. vLLM
zeroes new blocks for caches of mixed precision, which have the same fault, and for
Mamba's states; here it does so for budgeted layers beside other groups, too.

Where: ``KVCacheConfig.needs_kv_cache_zeroing``, which the scheduler and the worker
read, and ``CPUModelRunner._zero_block_ids``, which passes over specs that are no
``FullAttentionSpec``: sliding-window layers, and budgeted ones.

Upstream fix: patches/*/block_zeroing.patch, ``KVCacheSpec.padding_holds_metadata``.
"""

from __future__ import annotations

from typing import Any

import torch


def in_vllm() -> bool:
    """Whether vLLM asks a spec if its padding holds metadata."""
    from vllm.v1.kv_cache_interface import KVCacheSpec

    return hasattr(KVCacheSpec, "padding_holds_metadata")


def apply() -> None:
    """Patch both classes once per process."""
    if not in_vllm():
        _patch_config()
        _patch_cpu_runner()


def shares_metadata(kv_cache_groups: list[Any]) -> bool:
    """Whether blocks with metadata in their padding are shared with other groups.

    Args:
        kv_cache_groups: vLLM's ``KVCacheGroupSpec`` objects of an engine.

    """
    from vllm.v1.kv_cache_interface import iter_layer_specs

    return len(kv_cache_groups) > 1 and any(
        getattr(spec, "padding_holds_metadata", False)
        for group in kv_cache_groups
        for spec in iter_layer_specs(group.kv_cache_spec)
    )


def _patch_config() -> None:
    from vllm.v1.kv_cache_interface import KVCacheConfig

    stock = KVCacheConfig.needs_kv_cache_zeroing.fget
    if hasattr(stock, "hashevict_stock"):
        return

    def needs_kv_cache_zeroing(self: Any) -> bool:
        return stock(self) or shares_metadata(self.kv_cache_groups)

    needs_kv_cache_zeroing.hashevict_stock = stock  # type: ignore[attr-defined]
    KVCacheConfig.needs_kv_cache_zeroing = property(needs_kv_cache_zeroing)


def _patch_cpu_runner() -> None:
    from vllm.v1.kv_cache_interface import AttentionSpec
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    stock = CPUModelRunner._zero_block_ids
    if hasattr(stock, "hashevict_stock"):
        return

    def _zero_block_ids(self: Any, block_ids: list[int]) -> None:
        groups = self.kv_cache_config.kv_cache_groups
        if not shares_metadata(groups):
            stock(self, block_ids)
            return
        layers = self.compilation_config.static_forward_context
        ids = torch.tensor(block_ids)
        for group in groups:
            if not isinstance(group.kv_cache_spec, AttentionSpec):
                continue
            for name in group.layer_names:
                # Every layer's own view: at one address pages differ in size.
                layers[name].kv_cache.index_fill_(0, ids, 0)

    _zero_block_ids.hashevict_stock = stock  # type: ignore[attr-defined]
    CPUModelRunner._zero_block_ids = _zero_block_ids
