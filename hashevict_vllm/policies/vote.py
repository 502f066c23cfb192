"""HashEvict with memory: attention estimated from signatures, accumulated as votes.

The paper's one-step rule forgets what earlier queries needed. Here every query leaves a
vote on the slots it would attend to, estimated before attention from signatures and key
norms alone (the angle estimate of SimHash, Charikar 2002); H2O (arXiv 2306.14048)
accumulates true scores so. A prompt segment is judged at its end by its last queries,
max-pooled over neighbours, as SnapKV (arXiv 2404.14469) judges prompts by true scores.
"""

from __future__ import annotations

import math

import torch

from hashevict_vllm.config import ResolvedKVPolicy
from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.projection import num_words
from hashevict_vllm.policies.base import EvictionRule, LiveSlots


class Vote(EvictionRule):
    """The slot with the fewest votes is evicted, ``scoring = "vote"``."""

    def __init__(self, policy: ResolvedKVPolicy) -> None:
        super().__init__(policy)
        self.projected_bits = policy.hash_bits
        self.words = num_words(policy.hash_bits) + 2  # norm of the key, votes

    @property
    def kernel_code(self) -> int:
        """See `EvictionRule.kernel_code`."""
        return codes.VOTE

    def vote(
        self, q: torch.Tensor, q_bits: torch.Tensor, slots: LiveSlots, scale: float
    ) -> None:
        """Votes decay, then grow by the estimated attention of the query group.

        The angle between query and key is estimated as pi h / b from the Hamming
        distance h, so the logit is scale |q| |k| cos(pi h / b); softmax over the slots.
        """
        h = (q_bits[:, :, None] ^ slots.bits[:, None]).sum(-1)  # [Hkv, G, n]
        cosine = torch.cos(math.pi / self.policy.hash_bits * h.to(torch.float32))
        norms = q.norm(dim=-1)[..., None] * slots.k.norm(dim=-1)[:, None]
        attention = (scale * norms * cosine).softmax(-1).sum(1)
        slots.votes.mul_(self.policy.decay).add_(attention)

    def score(
        self, q_bits: torch.Tensor, k_bits: torch.Tensor, slots: LiveSlots, t: int
    ) -> torch.Tensor:
        """Fewest votes score highest; bits of non-negative floats order as they do."""
        return 2**31 - 1 - slots.votes.contiguous().view(torch.int32).to(torch.int64)

    def survivors(self, slots: LiveSlots, end: int) -> torch.Tensor:
        """Protected slots, then those with the most votes in their neighbourhood.

        A neighbourhood's votes become those of its slots, in place: in decode each slot
        is judged alone, and what was kept for its neighbours would go first.
        """
        position = slots.position
        near = (position[:, :, None] - position[:, None]).abs() <= self.policy.pool // 2
        pooled = torch.where(near, slots.votes[:, None], 0.0).amax(-1)
        slots.votes.copy_(pooled)
        protected = (position < self.policy.sinks) | (
            position >= end - self.policy.recent
        )
        pooled[protected] = float("inf")
        # Stable sorts: by age, then by votes, so that ties keep the newer slot.
        by_age = position.argsort(dim=1, descending=True)
        ranked = pooled.gather(1, by_age).argsort(dim=1, descending=True, stable=True)
        kept = by_age.gather(1, ranked[:, : self.policy.budget])
        return kept.sort(dim=1).values
