"""The KV-cache spec of a budgeted full-attention layer: page size and capacity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from hashevict_vllm.cache.bounds import BlockBounds
from hashevict_vllm.cache.copies import PageCopy, copy_pages
from hashevict_vllm.cache.page import tail_bytes
from hashevict_vllm.cache.prefix import PrefixCachingManager
from hashevict_vllm.config import KVPolicyError
from hashevict_vllm.policies import make_rule
from hashevict_vllm.resolved import ResolvedKVPolicy

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


@dataclass(frozen=True, kw_only=True)
class BudgetedAttentionSpec(AttentionSpec):
    """Full attention whose live slots per KV head are bounded by a policy.

    Subclasses `AttentionSpec`, as ``FullAttentionSpec.merge`` drops custom fields
    (vllm/v1/kv_cache_interface.py). Metadata live in the padded tail of the page, so
    vLLM's memory accounting is exact.

    Attributes:
        policy: The resolved policy.

    """

    policy: ResolvedKVPolicy

    def __post_init__(self) -> None:
        """Give the page its tail; a larger padding, set by vLLM, is kept."""
        super().__post_init__()
        needed = self.unpadded_page_size_bytes + self.tail_bytes
        if self.page_size_padded is None or self.page_size_padded < needed:
            object.__setattr__(self, "page_size_padded", needed)

    @classmethod
    def from_stock(
        cls, spec: FullAttentionSpec, policy: ResolvedKVPolicy
    ) -> BudgetedAttentionSpec:
        """The budgeted counterpart of a stock full-attention spec.

        Raises:
            KVPolicyError: If the spec asks for something a budgeted page cannot hold.

        """
        if spec.sliding_window is not None or spec.attention_chunk_size is not None:
            raise KVPolicyError(
                "--kv-policy: a sliding-window layer was turned into a full-attention "
                "one (--disable-hybrid-kv-cache-manager); its budget is not defined."
            )
        if spec.head_size_v != spec.head_size or spec.page_size_padded is not None:
            raise KVPolicyError(
                "--kv-policy: layers whose K and V differ in size or whose pages are "
                "already padded are not supported."
            )
        names = {field.name for field in fields(AttentionSpec) if field.init}
        kwargs = {name: getattr(spec, name) for name in names}
        return cls(**kwargs, policy=policy)

    @property
    def tail_bytes(self) -> int:
        """Bytes of signatures and positions in one page."""
        words = make_rule(self.policy).words
        return tail_bytes(self.num_kv_heads, self.block_size, words)

    @property
    def prefix_cacheable(self) -> bool:
        """With votes: other rules mark what they evict by later tokens' queries."""
        return self.policy.votes

    @property
    def bounds(self) -> BlockBounds:
        """Most blocks of a request."""
        return BlockBounds(self.policy.budget, self.policy.segment, self.block_size)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the largest request: the bound while its prompt is being read."""
        max_model_len = vllm_config.model_config.max_model_len
        return self.bounds.prefill_blocks(max_model_len) * self.page_size_bytes

    def copy_blocks(self, kv_cache: torch.Tensor, copies: Sequence[PageCopy]) -> None:
        """Copy pages of a layer, before a forward.

        Args:
            kv_cache: [B, H, N, 2D] as vLLM binds it.
            copies: Copies of blocks of this layer's group.

        """
        words = make_rule(self.policy).words
        copy_pages(kv_cache, self.page_size_bytes, words, copies)

    def describe_capacity(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
    ) -> str | None:
        """What the pool buys, for vLLM's log: see `cache.capacity`."""
        from hashevict_vllm.cache.capacity import describe_capacity

        return describe_capacity(vllm_config, kv_cache_config)


# At import, so that every process that unpickles a spec knows its manager
# (vllm/v1/kv_cache_spec_registry.py). Stock specs come first: `_ensure_registered`
# does nothing once the registry holds any entry.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(
    BudgetedAttentionSpec,
    PrefixCachingManager,
    uniform_type_base_spec=BudgetedAttentionSpec,
)
