"""Patches `Attention` layers: full-attention layers get the budgeted backend.

Where: the name ``get_attn_backend`` in
``vllm/model_executor/layers/attention/attention.py``, which ``Attention.__init__``
calls when the model brings no backend of its own. Why there: the current `VllmConfig`
is set, the layer's kind is known, and vLLM's own choice (with its per-process cache) is
made first and stays untouched, so policy on and off never mix.

Upstream fix: let a KV-cache policy in `VllmConfig` wrap the selected backend.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backend import AttentionBackend, AttentionType


def apply() -> None:
    """Patch once per process."""
    from vllm.model_executor.layers.attention import attention

    if not hasattr(attention.get_attn_backend, "hashevict_stock"):
        attention.get_attn_backend = _wrap(attention.get_attn_backend)


def _wrap(stock: Any) -> Any:
    def get_attn_backend(*args: Any, **kwargs: Any) -> type[AttentionBackend]:
        backend = stock(*args, **kwargs)
        if kwargs.get("has_sliding_window") or kwargs.get("use_mla"):
            return backend
        if kwargs.get("attn_type") not in (None, AttentionType.DECODER):
            return backend
        return _budgeted(backend)

    get_attn_backend.hashevict_stock = stock  # type: ignore[attr-defined]
    return get_attn_backend


def _budgeted(backend: Any) -> type[AttentionBackend]:
    from vllm.config import get_current_vllm_config

    from hashevict_vllm.compat import policy_of

    vllm_config = get_current_vllm_config()
    config = policy_of(vllm_config.additional_config)
    if not config.enabled:
        return backend
    from hashevict_vllm.attention.backend import wrap_backend

    policy = config.resolve(
        vllm_config.model_config.max_model_len, vllm_config.cache_config.block_size
    )
    return wrap_backend(backend, policy)
