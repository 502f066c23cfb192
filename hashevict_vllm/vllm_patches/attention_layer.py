"""Patches `Attention` layers: full-attention layers get the budgeted backend.

Where: the name ``get_attn_backend`` in
``vllm/model_executor/layers/attention/attention.py``, which ``Attention.__init__``
calls when the model brings no backend of its own. Why there: the current `VllmConfig`
is set, the layer's kind is known, and vLLM's own choice (with its per-process cache) is
made first and stays untouched, so policy on and off never mix.

Upstream fix: patches/*/attention_layer.patch, ``Attention.backend_wrappers``.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backend import AttentionBackend, AttentionType


def in_vllm() -> bool:
    """Whether vLLM lets plugins wrap a layer's backend."""
    from vllm.model_executor.layers.attention.attention import Attention

    return hasattr(Attention, "backend_wrappers")


def apply() -> None:
    """Patch once per process."""
    from vllm.model_executor.layers.attention import attention

    if in_vllm():
        wrappers = attention.Attention.backend_wrappers
        if budgeted_backend not in wrappers:
            wrappers.append(budgeted_backend)
    elif not hasattr(attention.get_attn_backend, "hashevict_stock"):
        attention.get_attn_backend = _wrap(attention.get_attn_backend)


def _wrap(stock: Any) -> Any:
    def get_attn_backend(*args: Any, **kwargs: Any) -> type[AttentionBackend]:
        backend = stock(*args, **kwargs)
        # Attention.__init__ passes all three by keyword (tests/support/contract).
        if kwargs["use_mla"] or kwargs["has_sliding_window"]:
            return backend
        return budgeted_backend(backend, attn_type=kwargs["attn_type"])

    get_attn_backend.hashevict_stock = stock  # type: ignore[attr-defined]
    return get_attn_backend


def budgeted_backend(
    backend: Any, *, attn_type: str, sliding_window: int | None = None
) -> type[AttentionBackend]:
    """The backend of a full-attention decoder layer, bounded where a policy is on.

    Args:
        backend: What vLLM selected for the layer.
        attn_type: The layer's `AttentionType`.
        sliding_window: Its window; None for full attention.

    Returns:
        ``backend`` itself for other layers, or with the policy off.

    """
    if sliding_window is not None or attn_type != AttentionType.DECODER:
        return backend
    from vllm.config import get_current_vllm_config

    from hashevict_vllm.config import policy_of
    from hashevict_vllm.host import resolve

    vllm_config = get_current_vllm_config()
    config = policy_of(vllm_config.additional_config)
    if not config.enabled:
        return backend
    from hashevict_vllm.attention.backend import wrap_backend

    return wrap_backend(backend, resolve(config, vllm_config))
