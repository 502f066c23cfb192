"""A vLLM backend on xformers, for a KV policy to wrap; vLLM knows it as CUSTOM.

It reads the cache and leaves writing to the wrapper (`gpu.forward`), and so is of no
use without a policy. What it cannot do, vLLM is told by its own hooks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend

from hashevict_vllm.attention.xformers.support import CUSTOM, unsupported

if TYPE_CHECKING:
    from vllm.platforms.interface import DeviceCapability


class XformersBackend(AttentionBackend):
    """Decoder self-attention over all live slots; everything else is refused.

    By the defaults of vLLM's base class there are no sliding windows, sinks, MLA,
    sparse or non-causal attention, quantised caches, or other than decoder layers.
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_name() -> str:
        """The name under which vLLM's registry has it."""
        return CUSTOM

    @staticmethod
    def get_impl_cls() -> Any:
        """`XformersImpl`; importing it imports xformers."""
        from hashevict_vllm.attention.xformers.impl import XformersImpl

        return XformersImpl

    @staticmethod
    def get_builder_cls() -> Any:
        """`XformersMetadataBuilder`; importing it imports xformers."""
        from hashevict_vllm.attention.xformers.metadata import XformersMetadataBuilder

        return XformersMetadataBuilder

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """No: xformers' biases are made from the host's lengths."""
        return False

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: Any,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: DeviceCapability,
    ) -> str | None:
        """Why no operator of xformers serves this; None if one does.

        Args:
            head_size: D.
            dtype: Of q, k and v.
            kv_cache_dtype: Looked at by vLLM.
            block_size: Any will do.
            use_mla: Looked at by vLLM.
            has_sink: Looked at by vLLM.
            use_sparse: Looked at by vLLM.
            use_mm_prefix: Looked at by vLLM.
            device_capability: Of the GPU.

        """
        capability = (device_capability.major, device_capability.minor)
        return unsupported(head_size, dtype, capability)
