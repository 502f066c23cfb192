"""HashEvict with memory: attention estimated from signatures, cast as votes.

The paper's one-step rule forgets what earlier queries needed. Here queries vote on the
slots that they would attend to, estimated from signatures and a few numbers of every
key (`hashevict_vllm.policies.frame`); H2O (arXiv 2306.14048) accumulates true scores
so. A vote counts from the next token on: a victim is chosen, before attention, by what
earlier queries said, and nobody waits for a ballot. A prompt segment is judged at its
end by its last queries, as SnapKV (arXiv 2404.14469) judges by true scores, but what
follows an attended slot is kept rather than what surrounds it.
"""

from __future__ import annotations

import math

import torch

from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.codes import (
    AHEAD,
    BEFORE_THE_END,
    NEIGHBOURS,
    RECENT_IN_SELECTION,
    SMOOTH,
)
from hashevict_vllm.kernels.projection import num_words
from hashevict_vllm.kernels.signature import signature_bits
from hashevict_vllm.policies.base import EvictionRule, LiveSlots
from hashevict_vllm.policies.frame import KeyFrame
from hashevict_vllm.policies.value import (
    credit,
    credit_weight,
    spread,
    without_octaves,
)
from hashevict_vllm.resolved import ResolvedKVPolicy


def estimate_scale(hash_bits: int, head_dim: int, orthogonal: bool) -> float:
    """Factor c that makes c sum_j (q . r_j) sign(k . r_j) an unbiased q . k / |k|.

    For Gaussian r, E[(q . r) sign(k . r)] = sqrt(2 / pi) q . k / |k| (QJL, arXiv
    2406.03482, lemma 3.2); orthogonalised columns have unit length, Gaussian ones
    sqrt(D).
    """
    length = math.sqrt(head_dim) if orthogonal else 1.0
    return math.sqrt(math.pi / 2) * length / hash_bits


def attention_of(logits: torch.Tensor) -> torch.Tensor:
    """Softmax of logits [.., n], of which those that are not finite get nothing.

    All zeros where none is finite, so that votes are numbers whatever keys hold.
    """
    known = torch.where(logits.isfinite(), logits, float("-inf"))
    return known.softmax(-1).nan_to_num(0.0)


class Vote(EvictionRule):
    """The slot with the fewest votes is evicted, ``scoring = "vote"``."""

    def __init__(self, policy: ResolvedKVPolicy) -> None:
        super().__init__(policy)
        self.projected_bits = policy.hash_bits
        self.words = num_words(policy.hash_bits) + 2  # see `Described.words`; votes

    @property
    def kernel_code(self) -> int:
        """See `EvictionRule.kernel_code`."""
        return codes.VOTE

    def vote(
        self,
        q: torch.Tensor,
        slots: LiveSlots,
        projection: torch.Tensor,
        scale: float,
        decode: bool,
    ) -> None:
        """Votes grow by the estimated attention, the largest of the query group.

        Softmax of ``scale`` times `dot_products` over the slots. In decode votes fade
        first, and large values get some more (`hashevict_vllm.policies.value`).
        """
        logits = self.dot_products(q, slots.k, projection) * scale
        votes = attention_of(logits).amax(1)
        if decode:
            slots.votes.mul_(self.policy.decay)
            votes += spread(slots.v, self.policy.value_votes)
        slots.votes.copy_(without_octaves(slots.votes + votes))

    def dot_products(
        self, q: torch.Tensor, k: torch.Tensor, projection: torch.Tensor
    ) -> torch.Tensor:
        """Estimates of q . k, up to a number that all keys of a query share.

        Along the frame's axes from coordinates; of the rest r of a key,
        |r| c sum_j (q . r_j) sign(r . r_j), see `estimate_scale`.

        Args:
            q: float32 [Hkv, G, D].
            k: float32 [Hkv, n, D], the sinks first, all of which must have arrived.
            projection: float32 [D, b].

        Returns:
            float32 [Hkv, G, n].

        """
        frame = KeyFrame.of(k, self.policy.sinks)
        described, (along, rest) = frame.describe(k), frame.split(q)
        signs = signature_bits(described.rest, projection).float() * 2 - 1
        c = estimate_scale(
            self.policy.hash_bits, q.shape[-1], orthogonal=self.policy.orthogonal
        )
        hashed = (rest @ projection) @ signs.transpose(1, 2) * c
        return (
            along @ described.along.transpose(1, 2) + hashed * described.length[:, None]
        )

    def score(
        self, q_bits: torch.Tensor, k_bits: torch.Tensor, slots: LiveSlots, t: int
    ) -> torch.Tensor:
        """Fewest votes score highest; nearly equal ones tie, so that age decides.

        Slots that no query wants differ in rounding only. The upper half of a
        non-negative float's bits, its first seven digits, orders as the float does.
        """
        bits = slots.votes.contiguous().view(torch.int32).to(torch.int64)
        return 2**15 - 1 - (bits >> 16)

    def survivors(self, slots: LiveSlots, end: int, goes_on: bool) -> torch.Tensor:
        """Protected slots, then those of the most merit.

        That is votes in the neighbourhood, and credit for an unusual value. In decode
        every slot is judged by its own votes, of which it has from now on at least
        `NEIGHBOURS` times its merit.
        """
        position = slots.position
        merit = self.merit(position, slots.votes, slots.v, goes_on)
        least = without_octaves(NEIGHBOURS * merit)
        slots.votes.copy_(torch.maximum(slots.votes, least))
        merit[self.protected(position, end)] = float("inf")
        # Stable sorts: by age, then by votes, so that ties keep the newer slot.
        by_age = position.argsort(dim=1, descending=True)
        ranked = merit.gather(1, by_age).argsort(dim=1, descending=True, stable=True)
        kept = by_age.gather(1, ranked[:, : self.policy.budget])
        return kept.sort(dim=1).values

    def protected(self, position: torch.Tensor, end: int) -> torch.Tensor:
        """What a selection keeps whatever it is worth: bool [Hkv, n].

        The sinks, and the last tokens, `RECENT_IN_SELECTION` at most.

        Args:
            position: int64 [Hkv, n].
            end: End of the segment.

        """
        recent = min(self.policy.recent, RECENT_IN_SELECTION)
        return (position < self.policy.sinks) | (position >= end - recent)

    def merit(
        self,
        position: torch.Tensor,
        votes: torch.Tensor,
        v: torch.Tensor,
        goes_on: bool,
    ) -> torch.Tensor:
        """What slots are worth when a segment is reduced: float32 [Hkv, n].

        Args:
            position: int64 [Hkv, n].
            votes: float32 [Hkv, n].
            v: float32 [Hkv, n, D].
            goes_on: Whether the prompt does.

        """
        policy, slots = self.policy, v.shape[1]
        pooled = self._pooled(position, votes)
        if policy.credit == 0:
            return pooled
        weight = credit_weight(policy.credit, policy.budget, slots)
        if goes_on:
            weight *= BEFORE_THE_END
        return pooled + credit(position, v, policy.sinks, weight)

    def _pooled(self, position: torch.Tensor, votes: torch.Tensor) -> torch.Tensor:
        """Votes [Hkv, n] smoothed, then the largest of a slot and those before it."""
        if self.policy.pool == 1:
            return votes.clone()
        behind = position[:, :, None] - position[:, None]
        near = behind.abs() <= SMOOTH
        smooth = torch.where(near, votes[:, None], 0.0).sum(-1) / (2 * SMOOTH + 1)
        reach = (behind >= -AHEAD) & (behind < self.policy.pool - AHEAD)
        return torch.where(reach, smooth[:, None], 0.0).amax(-1)
