"""HashEvict (arXiv 2412.16187): evict what is farthest in Hamming distance."""

from __future__ import annotations

import torch

from hashevict_vllm.policies.base import EvictionRule, LiveSlots


class InstantHamming(EvictionRule):
    """The paper's one-step rule (section 3), ``scoring = "instant"``.

    A slot's score is the Hamming distance between the signature of its key and that of
    the current query: sign bits of random projections differ in proportion to the angle
    between the vectors, so the largest distance marks the key that this query would
    attend to least. With grouped-query attention the distances of the group are summed.
    ``hash_source = "key"`` compares with the new key's signature instead, as the
    authors' released code does.
    """

    def score(
        self, q_bits: torch.Tensor, k_bits: torch.Tensor, slots: LiveSlots
    ) -> torch.Tensor:
        """Summed Hamming distances; see `EvictionRule.score`."""
        source = q_bits if self.policy.hash_source == "query" else k_bits[:, None]
        differ = source[:, :, None] ^ slots.bits[:, None]
        return differ.sum(dim=(1, 3))
