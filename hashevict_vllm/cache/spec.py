"""The KV-cache spec of a budgeted full-attention layer: page size and capacity."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from hashevict_vllm.cache.manager import BudgetedAttentionManager
from hashevict_vllm.cache.page import tail_bytes
from hashevict_vllm.compat.rules import policy_of
from hashevict_vllm.config import KVPolicyError
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
        """Blocks lose their token order, so no prefix of them can be shared."""
        return False

    @property
    def steady_blocks(self) -> int:
        """Most blocks a request holds once its prompt is read: ceil(C / N)."""
        return cdiv(self.policy.budget, self.block_size)

    def prefill_blocks(self, num_tokens: int) -> int:
        """Most blocks held while a prompt is read up to ``num_tokens`` (design 1.4)."""
        most = self.policy.budget
        if self.policy.segment > 1:  # token by token evicts before it writes
            most += self.policy.segment
        return cdiv(min(num_tokens, most), self.block_size)

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
        return spec.prefill_blocks(model.max_model_len) * self.page_size_bytes


# At import, so that every process that unpickles a spec knows its manager
# (vllm/v1/kv_cache_spec_registry.py). Stock specs come first: `_ensure_registered`
# does nothing once the registry holds any entry.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(
    BudgetedAttentionSpec,
    BudgetedAttentionManager,
    uniform_type_base_spec=BudgetedAttentionSpec,
)
