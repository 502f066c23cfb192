"""What a KV policy refuses to run with, and why.

`RULES` is the list; every rule is one small function that returns the sentence for
the user, or ``None`` where it has no objection. Rules read the finished `VllmConfig`,
after vLLM has resolved defaults, so a default that turns a feature on is seen too.
Rules that depend on the device are in `device`, on HTTP servers in `frontend`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from .. import host
from ..config import KVPolicyConfig, KVPolicyError, policy_of
from .device import (
    cpu_block_size,
    device_kernels,
    inner_backend,
    microbatches,
    platform,
    quantised_cache,
)
from .frontend import inspection

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

# Child of vLLM's logger, so that vLLM's handlers and level apply.
logger = logging.getLogger("vllm.hashevict_vllm.compat")

SUPPORTED_VLLM = ("0.32", "0.33")
"""Minor versions of vLLM whose internals the patches and rules were written for."""

LOCAL_LAYER_TYPES = frozenset(
    ("sliding_attention", "chunked_attention", "linear_attention", "mamba", "conv")
)
"""Hugging Face ``layer_types`` of layers whose state does not grow with the prompt."""

PREFIX_CACHING_SENTENCE = (
    "--enable-prefix-caching: needs scoring 'vote', as the other rules judge a prompt "
    "by queries that a cached prefix no longer computes; drop the flag or use "
    "--kv-policy hashevict with its default scoring."
)

Rule = Callable[["VllmConfig", KVPolicyConfig], "str | None"]


def check(vllm_config: VllmConfig) -> None:
    """Refuse a configuration that an enabled policy cannot serve.

    Raises:
        KVPolicyError: With the sentence of the first rule in `RULES` that objects.

    """
    policy = policy_of(vllm_config.additional_config)
    if not policy.enabled:
        return
    for rule in RULES:
        sentence = rule(vllm_config, policy)
        if sentence is not None:
            raise KVPolicyError(sentence)


def default_prefix_caching_off(engine_args: EngineArgs) -> None:
    """Switch vLLM's default of prefix caching off for rules without votes.

    Called before it is resolved:
    ``EngineArgs.enable_prefix_caching`` is ``None`` until
    ``_set_default_chunked_prefill_and_prefix_caching_args`` fills it in
    (vllm/engine/arg_utils.py).

    Raises:
        KVPolicyError: When the user asked for prefix caching.

    """
    if caches_prefixes(policy_of(engine_args.additional_config)):
        return
    if engine_args.enable_prefix_caching:
        raise KVPolicyError(PREFIX_CACHING_SENTENCE)
    if engine_args.enable_prefix_caching is None:
        engine_args.enable_prefix_caching = False
        logger.info("Prefix caching is off: it needs a KV policy that votes.")


def caches_prefixes(policy: KVPolicyConfig) -> bool:
    """Whether a policy can live with prefix caching: it votes."""
    return policy.scoring == "vote"


def is_supported_vllm(version: str) -> bool:
    """Whether a vLLM version belongs to `SUPPORTED_VLLM`; ``0.32.0+cpu`` does."""
    return ".".join(version.split(".")[:2]) in SUPPORTED_VLLM


# -- where it runs ---------------------------------------------------------------


def vllm_version(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``vllm.__version__``: the patches rely on internals that change by release."""
    import vllm

    if is_supported_vllm(vllm.__version__):
        return None
    supported = " and ".join(f"{minor}.x" for minor in SUPPORTED_VLLM)
    return (
        f"--kv-policy: vLLM {vllm.__version__} is not supported; "
        f"this release knows the internals of vLLM {supported}."
    )


# -- what the model is -----------------------------------------------------------


def _of_model(config: VllmConfig, reason: str) -> str:
    return f"--kv-policy: {config.model_config.architecture} {reason}."


def pooling_runner(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``ModelConfig.runner_type`` (vllm/config/model.py)."""
    if config.model_config.runner_type == "generate":
        return None
    return _of_model(
        config,
        f"runs with --runner {config.model_config.runner_type}, "
        "and a KV budget is for text generation",
    )


def encoder_decoder(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``ModelConfig.is_encoder_decoder`` (vllm/config/model.py)."""
    if not config.model_config.is_encoder_decoder:
        return None
    return _of_model(
        config, "is an encoder-decoder, whose cross-attention cache has a fixed length"
    )


def diffusion(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``ModelConfig.is_diffusion``: a canvas is rewritten, not appended to."""
    if not config.model_config.is_diffusion and config.diffusion_config is None:
        return None
    return _of_model(
        config, "is a diffusion language model, which does not decode token by token"
    )


def mla(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``ModelConfig.use_mla`` (vllm/config/model.py)."""
    if not config.model_config.use_mla:
        return None
    return _of_model(
        config,
        "uses multi-head latent attention, "
        "whose cache holds no per-head keys and values to evict",
    )


def attention_free(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``ModelConfig.is_attention_free``: pure Mamba and its kin."""
    if not config.model_config.is_attention_free:
        return None
    return _of_model(config, "has no attention layers and so no KV cache to bound")


def no_full_attention(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``CacheConfig.sliding_window`` is set when all layers slide (arg_utils.py)."""
    layer_types = getattr(config.model_config.hf_text_config, "layer_types", None) or ()
    all_local = bool(layer_types) and LOCAL_LAYER_TYPES.issuperset(layer_types)
    if not all_local and config.cache_config.sliding_window is None:
        return None
    return _of_model(
        config,
        "has no full-attention layer, and the state of its layers is bounded already",
    )


def mamba_hybrid(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """Mamba pages are sized by the stock attention page (platforms/interface.py)."""
    if not config.model_config.is_hybrid:
        return None
    return _of_model(
        config,
        "mixes attention with Mamba layers, whose state vLLM fits to the stock "
        "attention page and not yet to one with signatures",
    )


def replay_window(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """R-SWA: ``ModelConfig.rswa_window`` (vllm/config/model.py)."""
    if config.model_config.rswa_window is None:
        return None
    return _of_model(
        config, "masks its prompt by position (R-SWA), which evicted slots do not keep"
    )


def prefix_lm(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``ModelConfig.is_mm_prefix_lm``: images attend in both directions."""
    if not config.model_config.is_mm_prefix_lm:
        return None
    return _of_model(
        config,
        "attends in both directions inside images, which needs tokens in their "
        "original places; --language-model-only serves its text part",
    )


def alibi(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """Kernels take a slot's index for its position (triton_unified_attention.py)."""
    if not config.model_config.uses_alibi:
        return None
    return _of_model(
        config,
        "uses ALiBi, whose bias the attention kernel computes from a token's place in "
        "the cache, and eviction reorders those places",
    )


def shared_kv_layers(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``num_kv_shared_layers`` (vllm/model_executor/models/gemma3n.py, gemma4.py)."""
    shared = getattr(config.model_config.hf_text_config, "num_kv_shared_layers", 0)
    if not shared:
        return None
    return _of_model(
        config,
        f"shares the KV cache of earlier layers in {shared} layers, "
        "which would need the earlier layers' evictions",
    )


# -- which features are on -------------------------------------------------------


def kv_sharing_fast_prefill(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``CacheConfig.kv_sharing_fast_prefill`` (vllm/config/cache.py)."""
    if not config.cache_config.kv_sharing_fast_prefill:
        return None
    return (
        "--kv-sharing-fast-prefill: layers that share a KV cache skip prompt tokens, "
        "and a KV policy must see every token."
    )


def speculative_decoding(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``VllmConfig.speculative_config`` (vllm/config/vllm.py)."""
    if config.speculative_config is None:
        return None
    return (
        "--speculative-config: a rejected draft token cannot be taken back once it has "
        "evicted another token."
    )


def kv_offloading(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``CacheConfig.kv_offloading_size`` (vllm/config/cache.py)."""
    if config.cache_config.kv_offloading_size is None:
        return None
    return (
        "--kv-offloading-size: offloaded blocks are found again by their tokens, and a "
        "bounded cache overwrites tokens inside a block."
    )


def kv_connector(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``KVTransferConfig.kv_connector`` (vllm/config/kv_transfer.py)."""
    transfer = config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return None
    return (
        f"--kv-transfer-config: {transfer.kv_connector} moves blocks of consecutive "
        "tokens, and a bounded cache does not keep tokens in order."
    )


def kv_events(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``enable_kv_cache_events`` needs prefix caching (vllm/config/vllm.py)."""
    events = config.kv_events_config
    if events is None or not events.enable_kv_cache_events:
        return None
    if config.cache_config.enable_prefix_caching:
        return None
    return (
        "--kv-events-config: events report prefix-cached blocks, and prefix caching is "
        "off; it needs a KV policy that votes."
    )


def prefix_caching(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``CacheConfig.enable_prefix_caching``; see `default_prefix_caching_off`."""
    if not config.cache_config.enable_prefix_caching or caches_prefixes(policy):
        return None
    return PREFIX_CACHING_SENTENCE


def context_parallel(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """Both sizes of ``ParallelConfig`` (vllm/config/parallel.py)."""
    for kind in ("decode", "prefill"):
        if getattr(config.parallel_config, f"{kind}_context_parallel_size") > 1:
            return (
                f"--{kind}-context-parallel-size: ranks that each hold a part of the "
                "sequence cannot pick one victim per KV head."
            )
    return None


def replicated_kv_heads(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """Ranks beyond the KV heads hold copies (``max(1, total // tp)``, llama.py).

    A copy sees the queries of its rank alone, and rules that ask queries would evict
    other tokens from it than from the next.
    """
    ranks = config.parallel_config.tensor_parallel_size
    heads = config.model_config.get_total_num_kv_heads()
    asks = policy.scoring == "vote" or (
        policy.scoring == "instant" and policy.hash_source == "query"
    )
    if ranks <= heads or not asks:
        return None
    return (
        f"--tensor-parallel-size: {ranks} ranks would hold copies of the {heads} KV "
        f"heads of {config.model_config.architecture}, and every copy would evict by "
        f"its own queries; use at most {heads}."
    )


def hybrid_manager_off(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """Without it ``unify_hybrid_kv_cache_specs`` wants one kind (kv_cache_utils.py)."""
    if not config.scheduler_config.disable_hybrid_kv_cache_manager:
        return None
    model = config.model_config
    if model.attention_chunk_size is not None:
        return (
            "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE: must be 1, because "
            f"{model.architecture} has chunked layers that a KV policy leaves as they "
            "are, and that needs the hybrid KV cache manager."
        )
    if model.get_sliding_window() is not None or model.is_hybrid:
        return (
            f"--disable-hybrid-kv-cache-manager: {model.architecture} has layers that "
            "a KV policy leaves as they are, and only the hybrid manager serves both."
        )
    return None


# -- which sizes fit -------------------------------------------------------------


def budget_sizes(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """Budget and segment against the block size, by `KVPolicyConfig.resolve`."""
    longest = config.model_config.max_model_len
    try:
        host.resolve(policy, config)
    except KVPolicyError as error:
        return str(error)
    if isinstance(policy.budget, int) and policy.budget > longest:
        logger.warning(
            "--kv-budget: %d tokens is more than the longest request has (%d), so "
            "nothing will be evicted; were bytes meant? A budget counts tokens per KV "
            "head.",
            policy.budget,
            longest,
        )
    return None


RULES: tuple[Rule, ...] = (
    vllm_version,
    platform,
    pooling_runner,
    encoder_decoder,
    diffusion,
    mla,
    attention_free,
    no_full_attention,
    mamba_hybrid,
    replay_window,
    prefix_lm,
    alibi,
    shared_kv_layers,
    kv_sharing_fast_prefill,
    speculative_decoding,
    kv_offloading,
    kv_connector,
    kv_events,
    prefix_caching,
    context_parallel,
    replicated_kv_heads,
    microbatches,
    quantised_cache,
    hybrid_manager_off,
    inspection,
    inner_backend,
    cpu_block_size,
    budget_sizes,
    device_kernels,
)
"""Every reason for refusing to start, in the order in which they are looked at."""
