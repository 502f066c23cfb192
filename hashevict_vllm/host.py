"""What vLLM says of the machine, before it has decided all of its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from hashevict_vllm.config import KVPolicyConfig
    from hashevict_vllm.resolved import ResolvedKVPolicy

CPU_DEFAULT_BLOCK_SIZE = 128
"""Tokens of a block without ``--block-size`` on CPU (vllm/platforms/cpu.py)."""


def on_cpu() -> bool:
    """Whether numba's kernels serve this machine; else Triton's do."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def block_size_of(config: VllmConfig) -> int:
    """Tokens of a KV-cache block, also before vLLM has decided on a CPU's default.

    ``CacheConfig.block_size`` holds another default until then; vLLM 0.33 decides when
    the model is loaded (``update_block_size_for_backend``), 0.32 while it checks.
    """
    cache = config.cache_config
    if on_cpu() and not cache.user_specified_block_size:
        return CPU_DEFAULT_BLOCK_SIZE
    return cache.block_size


def resolve(policy: KVPolicyConfig, config: VllmConfig) -> ResolvedKVPolicy:
    """The policy in plain numbers for this model's length and block size.

    Args:
        policy: An enabled policy.
        config: The engine's configuration.

    Raises:
        KVPolicyError: If it does not fit them.

    """
    return policy.resolve(config.model_config.max_model_len, block_size_of(config))
