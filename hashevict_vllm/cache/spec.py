"""The KV-cache spec of a budgeted full-attention layer: page size and capacity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from hashevict_vllm.cache.bounds import BlockBounds, bounds_of
from hashevict_vllm.cache.copies import PageCopy, copy_pages
from hashevict_vllm.cache.page import tail_bytes
from hashevict_vllm.cache.prefix import PrefixCachingManager
from hashevict_vllm.config import KVPolicyError, policy_of
from hashevict_vllm.policies import make_rule
from hashevict_vllm.resolved import ResolvedKVPolicy

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class BudgetedAttentionSpec(AttentionSpec):
    """Full attention whose live slots per KV head are bounded by a policy.

    Subclasses `AttentionSpec`, as ``FullAttentionSpec.merge`` drops custom fields
    (vllm/v1/kv_cache_interface.py). Metadata live in the padded tail of the page, so
    vLLM's memory accounting is exact. In a hybrid model other groups may keep K/V
    there: vLLM zeroes blocks before they change hands (`vllm_patches.block_zeroing`).

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
        if type(spec) is not FullAttentionSpec or getattr(spec, "non_causal", False):
            raise KVPolicyError(
                f"--kv-policy: a layer keeps its cache as {type(spec).__name__}, which "
                "a budget does not know; use --kv-policy full."
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
    def padding_holds_metadata(self) -> bool:
        """A tail's bits are no K or V to layers of other groups (`block_zeroing`)."""
        return True

    @property
    def prefix_cacheable(self) -> bool:
        """With votes: other rules mark what they evict by later tokens' queries."""
        return self.policy.votes

    @property
    def bounds(self) -> BlockBounds:
        """Most blocks of a request with the server's budget."""
        return bounds_of(self.policy, self.block_size)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the largest request: the bound while its prompt is being read.

        With ``--max-model-len auto`` vLLM tries lengths with it, and a budget may be a
        share of the length.
        """
        model = vllm_config.model_config
        spec = self
        if model.original_max_model_len == -1:
            config = policy_of(vllm_config.additional_config)
            sizes: dict[str, Any] = config.sizes(model.max_model_len, self.block_size)
            spec = replace(self, policy=replace(self.policy, **sizes))
        return spec.bounds.prefill_blocks(model.max_model_len) * self.page_size_bytes

    def copy_blocks(self, kv_cache: torch.Tensor, copies: Sequence[PageCopy]) -> None:
        """Copy pages of a layer, before a forward.

        Args:
            kv_cache: [B, H, N, 2D] as vLLM binds it.
            copies: Copies of blocks of this layer's group.

        """
        words = make_rule(self.policy).words
        copy_pages(kv_cache, self.page_size_bytes, words, copies)


# At import, so that every process that unpickles a spec knows its manager
# (vllm/v1/kv_cache_spec_registry.py). Stock specs come first: `_ensure_registered`
# does nothing once the registry holds any entry.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(
    BudgetedAttentionSpec,
    PrefixCachingManager,
    uniform_type_base_spec=BudgetedAttentionSpec,
)
