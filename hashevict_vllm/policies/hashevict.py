"""HashEvict (arXiv 2412.16187): evict what is farthest in Hamming distance."""

from __future__ import annotations

import torch

from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.projection import num_words
from hashevict_vllm.policies.base import EvictionRule, LiveSlots
from hashevict_vllm.resolved import ResolvedKVPolicy


class InstantHamming(EvictionRule):
    """The paper's one-step rule (section 3), ``scoring = "instant"``.

    A slot's score is the Hamming distance between the signature of its key and that of
    the current query: sign bits of random projections differ in proportion to the angle
    between the vectors, so the largest distance marks the key that this query would
    attend to least. With grouped-query attention the distances of the group are summed.
    ``hash_source = "key"`` compares with the new key's signature instead, as the
    authors' released code does.
    """

    def __init__(self, policy: ResolvedKVPolicy) -> None:
        super().__init__(policy)
        self.projected_bits = policy.hash_bits
        self.words = num_words(policy.hash_bits)

    @property
    def kernel_code(self) -> int:
        """Hamming distance to the query or to the new key."""
        if self.policy.hash_source == "query":
            return codes.HAMMING_TO_QUERY
        return codes.HAMMING_TO_KEY

    def score(
        self, q_bits: torch.Tensor, k_bits: torch.Tensor, slots: LiveSlots, t: int
    ) -> torch.Tensor:
        """Summed Hamming distances; see `EvictionRule.score`."""
        source = q_bits if self.policy.hash_source == "query" else k_bits[:, None]
        differ = source[:, :, None] ^ slots.bits[:, None]
        return differ.sum(dim=(1, 3))
