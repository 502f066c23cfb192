"""Refusals that depend on the processes that serve HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import KVPolicyConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def inspection(config: VllmConfig, policy: KVPolicyConfig) -> str | None:
    """Whether the process that is asked knows the request, and has our routes.

    ``_api_process_count`` of ``ParallelConfig``; ``VLLM_USE_RUST_FRONTEND``.
    """
    from vllm import envs

    if not policy.inspect:
        return None
    if envs.VLLM_USE_RUST_FRONTEND:
        return (
            "--kv-policy-config.inspect: vLLM's Rust frontend has no routes of "
            "plugins; unset VLLM_USE_RUST_FRONTEND."
        )
    if config.parallel_config._api_process_count > 1:
        return (
            "--kv-policy-config.inspect: several API servers know their own requests "
            "alone, and a question goes to any of them; use --api-server-count 1."
        )
    return None
