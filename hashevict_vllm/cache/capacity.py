"""Says in plain words what a budget buys at the pool's size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import KVCacheConfig, UniformTypeKVCacheSpecs

from hashevict_vllm.cache.spec import BudgetedAttentionSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.hashevict_vllm.cache")


def describe_capacity(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> str | None:
    """One sentence on the steady state; None if no layer is budgeted.

    Args:
        vllm_config: The engine's configuration.
        kv_cache_config: The resolved pool and its groups.

    """
    max_model_len = vllm_config.model_config.max_model_len
    num_blocks = kv_cache_config.num_blocks - 1  # block 0 is vLLM's null block
    blocks = peak = stock = page_bytes = metadata_bytes = 0
    budgeted = None
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            layer_specs = list(spec.kv_cache_specs.values())
            spec = layer_specs[0]
        else:
            layer_specs = [spec] * len(group.layer_names)
        if isinstance(spec, BudgetedAttentionSpec):
            budgeted, bounds = spec, spec.bounds
            blocks += bounds.decode_blocks(max_model_len)
            peak += bounds.prefill_blocks(max_model_len)
            stock += cdiv(max_model_len, spec.block_size)
            page_bytes += sum(s.page_size_bytes for s in layer_specs)
            metadata_bytes += sum(s.tail_bytes for s in layer_specs)
        else:
            same = cdiv(spec.max_memory_usage_bytes(vllm_config), spec.page_size_bytes)
            blocks, peak, stock = blocks + same, peak + same, stock + same
    if budgeted is None:
        return None
    policy, cached = budgeted.policy, ""
    if budgeted.prefix_cacheable and vllm_config.cache_config.enable_prefix_caching:
        cached = " Cached prefixes lie in blocks that are free, and take no request's."
    mib = budgeted.bounds.steady_blocks * page_bytes / 2**20
    return (
        f"KV budget: {policy.budget} tokens per KV head. A request holds at most "
        f"{blocks} blocks ({mib:.1f} MiB in budgeted layers, "
        f"{100 * metadata_bytes / (page_bytes - metadata_bytes):.1f}% of K/V for "
        f"signatures and positions) once its prompt is read, {peak} while it is. This "
        f"pool of {num_blocks} blocks serves {num_blocks / blocks:.1f} requests of "
        f"any length at once, {num_blocks / peak:.1f} while all read long prompts; "
        f"stock vLLM {num_blocks / stock:.2f} of {max_model_len} tokens.{cached}"
    )


def log_capacity(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Log `describe_capacity` at INFO, where a layer is budgeted."""
    if sentence := describe_capacity(vllm_config, kv_cache_config):
        logger.info(sentence)
