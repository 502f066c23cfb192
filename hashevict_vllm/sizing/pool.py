"""The pool and its groups, made by vLLM's own functions from plain sizes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from hashevict_vllm.cache.capacity import Capacity, capacity, group_needs
from hashevict_vllm.cache.spec import BudgetedAttentionSpec
from hashevict_vllm.compat import rules
from hashevict_vllm.config import KVPolicyConfig
from hashevict_vllm.values import KVPolicyError, fail

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MODEL_RULES = (
    rules.encoder_decoder,
    rules.mla,
    rules.attention_free,
    rules.no_full_attention,
    rules.mamba_hybrid,
    rules.alibi,
    rules.shared_kv_layers,
    rules.replicated_kv_heads,
    rules.budget_sizes,
)
"""What is refused whatever the machine; the others look at this one."""

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Load:
    """What a pool holds of requests of one length.

    Attributes:
        length: Tokens of a request, prompt and output.
        found: Requests at once, with the budget and in stock vLLM.
        request_bytes: Bytes of such a request once its prompt is read, all groups.
        reading_bytes: The same while its prompt is read.
        stock_request_bytes: In stock vLLM.

    """

    length: int
    found: Capacity
    request_bytes: int
    reading_bytes: int
    stock_request_bytes: int


def layer_specs(
    vllm_config: VllmConfig, policy: KVPolicyConfig, dtype: torch.dtype
) -> dict[str, KVCacheSpec]:
    """What each layer of one worker keeps, as its backend would say.

    Args:
        vllm_config: Of the model, with the block size that is planned for.
        policy: An enabled policy.
        dtype: Of K and V.

    Raises:
        KVPolicyError: For a model that a policy cannot serve, or whose layers differ
            in a way that its ``config.json`` alone does not tell.

    """
    for rule in MODEL_RULES:
        if reason := rule(vllm_config, policy):
            raise KVPolicyError(reason)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    text = model.hf_text_config
    for name in ("global_head_dim", "num_global_key_value_heads"):
        if getattr(text, name, None) is not None:
            raise fail("MODEL", f"{name}: its layers differ in size; start it instead.")
    count = model.get_num_layers(parallel)
    kinds = list(getattr(text, "layer_types", None) or [])[:count]
    sizes = {
        "block_size": vllm_config.cache_config.block_size,
        "num_kv_heads": model.get_num_kv_heads(parallel),
        "head_size": model.get_head_size(),
        "dtype": dtype,
    }
    longest, block = model.max_model_len, vllm_config.cache_config.block_size
    full = BudgetedAttentionSpec.from_stock(
        FullAttentionSpec(**sizes), policy.resolve(longest, block)
    )
    window = model.get_sliding_window()
    specs: dict[str, KVCacheSpec] = {}
    for layer, kind in enumerate(kinds or [FULL] * count):
        if kind not in (FULL, SLIDING):
            raise fail("MODEL", f"{kind}: such layers are not planned; start it.")
        specs[f"model.layers.{layer}.self_attn.attn"] = (
            full if kind == FULL else SlidingWindowSpec(**sizes, sliding_window=window)
        )
    return specs


def make_pool(
    vllm_config: VllmConfig, specs: dict[str, KVCacheSpec], pool_bytes: int
) -> KVCacheConfig:
    """Groups and blocks of a pool, as vLLM makes them (kv_cache_utils.py)."""
    # What backends of ours resolve to (attention/backend.py); it orders a block's
    # bytes, and does not change how many there are.
    vllm_config.cache_config.kv_cache_layout = KVCacheLayout.LBHNC.name
    groups = get_kv_cache_groups(vllm_config, dict(specs))
    return get_kv_cache_config_from_groups(vllm_config, groups, pool_bytes)


def load_of(vllm_config: VllmConfig, pool: KVCacheConfig, length: int) -> Load:
    """What a pool holds of requests of a length, by the engine's own arithmetic."""
    shortened = copy.copy(vllm_config)
    shortened.model_config = copy.copy(vllm_config.model_config)
    shortened.model_config.max_model_len = length
    _, groups = group_needs(shortened, pool)
    return Load(
        length=length,
        found=capacity(groups, pool.num_blocks),
        request_bytes=sum(g.blocks * g.block_bytes for g in groups),
        reading_bytes=sum(g.peak * g.block_bytes for g in groups),
        stock_request_bytes=sum(g.stock * g.stock_block_bytes for g in groups),
    )
