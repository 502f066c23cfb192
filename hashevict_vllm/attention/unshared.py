"""What implementations on every device refuse when a layer is made."""

from __future__ import annotations

from typing import Any

from hashevict_vllm.config import KVPolicyError


class UnsharedCacheMixin:
    """A layer's cache must be its own; base of the mixins of each device."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As the inner implementation.

        Raises:
            KVPolicyError: For a layer that reads another layer's KV cache.

        """
        super().__init__(*args, **kwargs)
        if getattr(self, "kv_sharing_target_layer_name", None) is not None:
            raise KVPolicyError(
                "--kv-policy: a layer of this model shares the KV cache of another "
                "(cross-layer KV sharing), which would need that layer's evictions."
            )
