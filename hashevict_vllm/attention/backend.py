"""Wraps a stock attention backend: budgeted spec, planned steps, evicting forward."""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from hashevict_vllm.attention.forward import BudgetedImplMixin
from hashevict_vllm.attention.metadata import BudgetedMetadataBuilderMixin
from hashevict_vllm.cache.spec import BudgetedAttentionSpec
from hashevict_vllm.config import ResolvedKVPolicy


@functools.cache
def wrap_backend(
    inner: type[AttentionBackend], policy: ResolvedKVPolicy
) -> type[AttentionBackend]:
    """The backend that bounds ``inner`` by ``policy``.

    A class per (inner, policy), so that two engines in one process cannot see each
    other's choice. It keeps the inner backend's name: vLLM looks it up in its enum, and
    everything it decides by name holds for the wrapped backend too.

    Args:
        inner: What vLLM selected, by ``--attention-backend`` or by itself.
        policy: The resolved policy.

    """
    impl = type(
        f"Budgeted{inner.get_impl_cls().__name__}",
        (BudgetedImplMixin, inner.get_impl_cls()),
        {"policy": policy},
    )
    builder = type(
        f"Budgeted{inner.get_builder_cls().__name__}",
        (BudgetedMetadataBuilderMixin, inner.get_builder_cls()),
        {},
    )

    def customize_spec(cls: type, spec: AttentionSpec) -> AttentionSpec:
        spec = inner.customize_spec(spec)
        if not isinstance(spec, FullAttentionSpec):
            return spec
        return BudgetedAttentionSpec.from_stock(spec, policy)

    namespace: dict[str, Any] = {
        "forward_includes_kv_cache_update": True,
        "inner": inner,
        "policy": policy,
        "get_impl_cls": staticmethod(lambda: impl),
        "get_builder_cls": staticmethod(lambda: builder),
        "customize_spec": classmethod(customize_spec),
        # A padded page cannot be split into kernel blocks; prefix sharing is refused.
        "supports_kv_connector": classmethod(lambda cls: False),
    }
    return type(f"Budgeted{inner.__name__}", (inner,), namespace)
