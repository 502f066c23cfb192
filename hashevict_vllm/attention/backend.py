"""Wraps a stock attention backend: budgeted spec, planned steps, evicting forward."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from hashevict_vllm import host
from hashevict_vllm.cache.spec import BudgetedAttentionSpec
from hashevict_vllm.config import KVPolicyError
from hashevict_vllm.resolved import ResolvedKVPolicy

if TYPE_CHECKING:
    from vllm.v1.kv_cache_layout import KVCacheLayout


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

    Raises:
        KVPolicyError: On CUDA, for a backend that cannot be wrapped, or a rule that has
            no kernel there.

    """
    on_cpu = host.on_cpu()
    parts = _cpu_parts() if on_cpu else _device_parts(inner, policy)
    impl = type(
        f"Budgeted{inner.get_impl_cls().__name__}",
        (parts.impl, inner.get_impl_cls()),
        {"__module__": __name__, "policy": policy, **parts.shared},
    )
    builder = type(
        f"Budgeted{inner.get_builder_cls().__name__}",
        (parts.builder, inner.get_builder_cls()),
        {"__module__": __name__, **parts.shared},
    )

    def customize_spec(cls: type, spec: AttentionSpec) -> AttentionSpec:
        spec = inner.customize_spec(spec)
        if not isinstance(spec, FullAttentionSpec):
            return spec
        if not on_cpu:
            _refuse_split_blocks(inner, spec.block_size)
        return BudgetedAttentionSpec.from_stock(spec, policy)

    namespace = {
        "__module__": __name__,
        "forward_includes_kv_cache_update": True,
        "inner": inner,
        "policy": policy,
        "get_impl_cls": staticmethod(lambda: impl),
        "get_builder_cls": staticmethod(lambda: builder),
        "customize_spec": classmethod(customize_spec),
        # A padded page cannot be split into kernel blocks.
        "supports_kv_connector": classmethod(lambda cls: False),
        **parts.backend,
    }
    return type(f"Budgeted{inner.__name__}", (inner,), namespace)


def _refuse_split_blocks(inner: type[AttentionBackend], block_size: int) -> None:
    """Blocks must be such as the backend reads whole.

    Larger ones vLLM splits (``create_kv_cache_views``, v1/kv_cache_interface.py), and
    pages with a tail cannot be.

    Raises:
        KVPolicyError: For a size that would be split.

    """
    supported = inner.get_supported_kernel_block_sizes()
    bases = [size.base for size in supported if isinstance(size, MultipleOf)]
    exact = [size for size in supported if not isinstance(size, MultipleOf)]
    if block_size in exact or any(block_size % base == 0 for base in bases):
        return
    sizes = [str(size) for size in exact] + [f"multiples of {base}" for base in bases]
    raise KVPolicyError(
        f"--block-size: {inner.get_name()} reads blocks of {' or '.join(sizes)} "
        f"tokens, and {block_size} would have to be split, which pages with "
        "signatures cannot be; use one of those."
    )


# Each device's kernels are imported where they run: numba is not needed on a GPU, nor
# Triton on a CPU.


class _Parts(NamedTuple):
    """What differs by device.

    Attributes:
        impl: Mixed into the inner implementation.
        builder: Mixed into the inner metadata builder.
        shared: Attributes of both.
        backend: Attributes of the backend.

    """

    impl: type
    builder: type
    shared: dict[str, Any]
    backend: dict[str, Any]


def _cpu_parts() -> _Parts:
    """With numba's kernels."""
    from hashevict_vllm.attention.cpu.forward import BudgetedImplMixin
    from hashevict_vllm.attention.cpu.metadata import BudgetedMetadataBuilderMixin

    return _Parts(BudgetedImplMixin, BudgetedMetadataBuilderMixin, {}, {})


def _device_parts(inner: type[AttentionBackend], policy: ResolvedKVPolicy) -> _Parts:
    """With Triton's kernels, if ``inner`` and the policy's rule are served by them."""
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts

    from hashevict_vllm.attention.gpu.forward import DeviceImplMixin
    from hashevict_vllm.attention.gpu.metadata import DeviceMetadataBuilderMixin
    from hashevict_vllm.attention.gpu.rule import device_rule
    from hashevict_vllm.attention.inner import inner_backend

    needs = inner_backend(inner.get_name())
    device_rule(policy)

    def supported_kv_cache_layouts(cls: type) -> tuple[KVCacheLayout, ...]:
        # The tail follows K/V of all heads, so no head may lie outside its page.
        layouts = get_supported_kv_cache_layouts([inner])
        return tuple(layout for layout in layouts if layout.is_block_compact)

    backend = {
        "supported_kv_cache_layouts": classmethod(supported_kv_cache_layouts),
        # vLLM 0.33: a model must not write the cache in place of a budgeted forward.
        "supports_kv_cache_update_bypass": False,
    }
    return _Parts(
        DeviceImplMixin, DeviceMetadataBuilderMixin, {"needs": needs}, backend
    )
