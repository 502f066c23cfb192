"""Says in plain words what a budget buys at the pool's size.

`capacity` is the arithmetic, from sizes alone; `describe_capacity` reads the sizes out
of an engine that has just made its pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import KVCacheConfig, UniformTypeKVCacheSpecs

from hashevict_vllm.cache.spec import BudgetedAttentionSpec
from hashevict_vllm.config import option_flag
from hashevict_vllm.resolved import ResolvedKVPolicy
from hashevict_vllm.shared import CAPACITY
from hashevict_vllm.values import fail

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.hashevict_vllm.cache")


@dataclass(frozen=True)
class GroupNeed:
    """What one request holds in one group of layers, which share a block table.

    Attributes:
        blocks: Most blocks once its prompt is read.
        peak: Most blocks while it is read.
        stock: Blocks of stock vLLM for the longest request.
        block_bytes: A block's pages of all layers of the group.
        stock_block_bytes: The same without our metadata.
        metadata_bytes: Signatures and positions in ``block_bytes``; 0 for a group that
            the policy leaves alone.

    """

    blocks: int
    peak: int
    stock: int
    block_bytes: int
    stock_block_bytes: int
    metadata_bytes: int = 0


@dataclass(frozen=True)
class Capacity:
    """What a pool serves.

    Attributes:
        blocks: Most blocks of a request once its prompt is read, over all groups.
        peak: Most blocks while it is read.
        request_bytes: Bytes of ``blocks`` in budgeted groups.
        metadata_share: Signatures and positions, as a share of K/V.
        requests: Requests of any length at once (a fraction).
        requests_reading: Requests at once while all read long prompts.
        stock_requests: Requests of the longest length at once in stock vLLM, whose
            smaller pages make more blocks of the same bytes.

    """

    blocks: int
    peak: int
    request_bytes: int
    metadata_share: float
    requests: float
    requests_reading: float
    stock_requests: float


def capacity(groups: Sequence[GroupNeed], num_blocks: int) -> Capacity:
    """What a pool of ``num_blocks`` blocks, one of them vLLM's null block, serves.

    A block has room for the pages of the largest group (vLLM's kv_cache_utils.py).

    Args:
        groups: All groups of the model, at least one of them budgeted.
        num_blocks: Blocks of the pool.

    """
    budgeted = [group for group in groups if group.metadata_bytes]
    pool_bytes = num_blocks * max(group.block_bytes for group in groups)
    stock_blocks = pool_bytes // max(group.stock_block_bytes for group in groups)
    blocks = sum(group.blocks for group in groups)
    peak = sum(group.peak for group in groups)
    metadata = sum(group.metadata_bytes for group in budgeted)
    return Capacity(
        blocks=blocks,
        peak=peak,
        request_bytes=sum(group.blocks * group.block_bytes for group in budgeted),
        metadata_share=metadata / sum(group.stock_block_bytes for group in budgeted),
        requests=(num_blocks - 1) / blocks,
        requests_reading=(num_blocks - 1) / peak,
        stock_requests=(stock_blocks - 1) / sum(group.stock for group in groups),
    )


def describe_capacity(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> str | None:
    """One sentence on the steady state; None if no layer is budgeted.

    Args:
        vllm_config: The engine's configuration.
        kv_cache_config: The resolved pool and its groups.

    """
    policies, groups = group_needs(vllm_config, kv_cache_config)
    if not policies:
        return None
    found, cached = capacity(groups, kv_cache_config.num_blocks), ""
    if policies[0].votes and vllm_config.cache_config.enable_prefix_caching:
        cached = " Cached prefixes lie in blocks that are free, and take no request's."
    return (
        f"KV budget: {policies[0].budget} tokens per KV head. A request holds at most "
        f"{found.blocks} blocks ({found.request_bytes / 2**20:.1f} MiB in budgeted "
        f"layers, {100 * found.metadata_share:.1f}% of K/V for signatures and "
        f"positions) once its prompt is read, {found.peak} while it is. This pool of "
        f"{kv_cache_config.num_blocks - 1} blocks serves {found.requests:.1f} requests "
        f"of any length at once, {found.requests_reading:.1f} while all read long "
        f"prompts; stock vLLM {found.stock_requests:.2f} of "
        f"{vllm_config.model_config.max_model_len} tokens.{cached}"
    )


def group_needs(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> tuple[list[ResolvedKVPolicy], list[GroupNeed]]:
    """What one request of ``max_model_len`` tokens holds in each group.

    Args:
        vllm_config: The engine's configuration.
        kv_cache_config: The resolved pool and its groups.

    Returns:
        The policies of the budgeted groups, and the need of every group.

    """
    policies, groups = [], []
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            layers = list(spec.kv_cache_specs.values())
        else:
            layers = [spec] * len(group.layer_names)
        groups.append(_need(vllm_config, layers))
        if isinstance(layers[0], BudgetedAttentionSpec):
            policies.append(layers[0].policy)
    return policies, groups


def check_full(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Refuse ``allow_full`` where groups share a pool that one request may not fit.

    With one group a front end knows how long a request may grow
    (`vllm_patches.request_checks`); with more it cannot tell.

    Raises:
        KVPolicyError: With what is needed, and what there is.

    """
    policies, groups = group_needs(vllm_config, kv_cache_config)
    if len(groups) < 2 or not any(policy.allow_full for policy in policies):
        return
    need, there = sum(group.stock for group in groups), kv_cache_config.num_blocks - 1
    if need > there:
        raise fail(
            option_flag("allow_full"),
            f"a request of {vllm_config.model_config.max_model_len} tokens takes "
            f"{need} blocks of this hybrid model, and the KV cache has {there}; lower "
            "--max-model-len, or give it more memory.",
        )


def pool_capacity(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> Capacity | None:
    """What an engine's pool serves; None if no layer is budgeted.

    Args:
        vllm_config: The engine's configuration.
        kv_cache_config: The resolved pool and its groups.

    """
    policies, groups = group_needs(vllm_config, kv_cache_config)
    return capacity(groups, kv_cache_config.num_blocks) if policies else None


def _need(vllm_config: VllmConfig, layers: list[Any]) -> GroupNeed:
    """The need of one group, given the specs of its layers."""
    spec = layers[0]
    block_bytes = sum(layer.page_size_bytes for layer in layers)
    # Mamba states have no padding of ours.
    stock_bytes = sum(
        getattr(layer, "unpadded_page_size_bytes", layer.page_size_bytes)
        for layer in layers
    )
    if not isinstance(spec, BudgetedAttentionSpec):
        blocks = cdiv(spec.max_memory_usage_bytes(vllm_config), spec.page_size_bytes)
        return GroupNeed(blocks, blocks, blocks, block_bytes, stock_bytes)
    longest = vllm_config.model_config.max_model_len
    stock = cdiv(longest, spec.block_size)
    return GroupNeed(
        blocks=spec.bounds.decode_blocks(longest),
        peak=spec.bounds.prefill_blocks(longest),
        stock=stock,
        block_bytes=block_bytes,
        stock_block_bytes=stock_bytes,
        metadata_bytes=sum(layer.tail_bytes for layer in layers),
    )


def log_capacity(
    vllm_config: VllmConfig, kv_cache_configs: Sequence[KVCacheConfig]
) -> None:
    """Log `describe_capacity` at INFO, where a layer is budgeted; show it as a metric.

    Args:
        vllm_config: The engine's configuration.
        kv_cache_configs: Those of the workers; they differ in layer names only.

    """
    config = kv_cache_configs[0]
    if found := pool_capacity(vllm_config, config):
        logger.info(describe_capacity(vllm_config, config))
        CAPACITY.open(vllm_config.parallel_config.data_parallel_index)
        CAPACITY.add(found.requests)
