"""What a KV policy refuses on the device that it is asked to run on: rules of `compat`.

Policies run on CPUs, with numba's kernels, and on CUDA, with Triton's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import host
from ..config import KVPolicyConfig, KVPolicyError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CPU_BLOCK_UNIT = 32
"""Tokens of one kernel block on CPU (vllm/v1/attention/backends/cpu_attn.py)."""

PLAIN_KV_DTYPES = ("auto", "float16", "bfloat16")
"""Values of ``CacheConfig.cache_dtype`` that store keys and values unquantised."""

FP8_KV_DTYPES = ("fp8", "fp8_e4m3")
"""Those with one scale per layer that the GPU kernels write. vLLM's Triton backend
takes the bytes of an ``fp8_e5m2`` cache for e4m3 (triton_attn.py)."""


def platform(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``current_platform`` (vllm/platforms/interface.py); ROCm is not CUDA there."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() or current_platform.is_cuda():
        return None
    name = current_platform.device_name
    return f"--kv-policy: the {name} platform is not supported, only CPU and CUDA are."


def microbatches(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``ParallelConfig.use_ubatching`` (vllm/config/parallel.py)."""
    if not config.parallel_config.use_ubatching:
        return None
    return (
        "--enable-dbo: two halves of a batch would plan their evictions at once, "
        "which has not been tried with a KV policy yet."
    )


def quantised_cache(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``CacheConfig.cache_dtype``, also when it comes from the checkpoint."""
    dtype = config.cache_config.cache_dtype
    model_dtype = str(config.model_config.dtype).removeprefix("torch.")
    if dtype in ("auto", model_dtype):
        return None
    if dtype in PLAIN_KV_DTYPES:
        return (
            f"--kv-cache-dtype: {dtype} differs from --dtype {model_dtype}, and a KV "
            "policy stores keys and values as the model computes them; use auto."
        )
    if host.on_cpu():
        return (
            f"--kv-cache-dtype: {dtype} is quantised, and on a CPU a KV policy can "
            "rewrite single slots of an unquantised cache only; use bfloat16."
        )
    if dtype in FP8_KV_DTYPES:
        return None
    return (
        f"--kv-cache-dtype: {dtype} is not among the quantised caches whose slots a KV "
        "policy can rewrite; use fp8 or auto."
    )


def inner_backend(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """``AttentionConfig.backend``, or that of full-attention layers if they have one.

    What vLLM chooses itself is looked at by layer.
    """
    from ..attention.inner import refuse_backend
    from ..attention.xformers import support as xformers_support

    attention = config.attention_config
    chosen = attention.backend_per_kind.get("full_attention", attention.backend)
    if host.on_cpu() or chosen is None:
        return None
    sentence = refuse_backend(chosen.name)
    if sentence is None and chosen.name == xformers_support.CUSTOM:
        return xformers_support.refuse(config)
    return sentence


def cpu_block_size(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """A padded page cannot be split into kernel blocks (v1/worker/utils.py)."""
    size = host.block_size_of(config)
    if not host.on_cpu() or size % CPU_BLOCK_UNIT == 0:
        return None
    return (
        f"--block-size: {size} is not a multiple of {CPU_BLOCK_UNIT}, the unit of "
        "vLLM's CPU attention kernel."
    )


def device_kernels(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """What the Triton kernels serve, by `attention.gpu.rule.device_rule`."""
    if host.on_cpu():
        return None
    from ..attention.gpu.rule import device_rule

    try:
        device_rule(host.resolve(policy, config))
    except KVPolicyError as error:
        return str(error)
    return None
