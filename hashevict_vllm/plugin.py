"""Entry point ``vllm.general_plugins``: vLLM calls it in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Apply the run-time patches, name our backend; safe to call more than once."""
    from .attention.xformers import support
    from .vllm_patches import apply_all

    apply_all()
    support.register()
