"""The oracle model, and policies as the tests' engine resolves them."""

from __future__ import annotations

from typing import Any

from hashevict_vllm.config import KVPolicyConfig
from hashevict_vllm.resolved import ResolvedKVPolicy
from hashevict_vllm.verify.oracle import Oracle, SlidingLayer
from support.engine import MAX_MODEL_LEN

__all__ = ["Oracle", "SlidingLayer", "resolve"]


def resolve(policy: dict[str, Any], block_size: int = 32) -> ResolvedKVPolicy:
    """The policy as the engine resolves it."""
    options = {"name": "hashevict", **policy}
    return KVPolicyConfig.from_dict(options).resolve(MAX_MODEL_LEN, block_size)
