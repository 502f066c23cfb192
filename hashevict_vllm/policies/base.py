"""The interface of an eviction rule, as the float32 oracle runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from hashevict_vllm.resolved import ResolvedKVPolicy


@dataclass
class LiveSlots:
    """Live slots of one layer of one request, in order of arrival.

    Attributes:
        k: float32 [Hkv, n, D], keys after RoPE.
        v: float32 [Hkv, n, D].
        bits: bool [Hkv, n, b], signatures of the keys.
        position: int64 [Hkv, n], absolute positions, distinct in each row.
        votes: float32 [Hkv, n], what rules that vote have accumulated.

    """

    k: torch.Tensor
    v: torch.Tensor
    bits: torch.Tensor
    position: torch.Tensor
    votes: torch.Tensor

    def __len__(self) -> int:
        return self.k.shape[1]

    def first(self, n: int) -> LiveSlots:
        """The n oldest arrivals, as views."""
        return LiveSlots(*(field[:, :n] for field in vars(self).values()))

    def append(self, other: LiveSlots) -> LiveSlots:
        """These slots followed by others."""
        return LiveSlots(
            *(
                torch.cat([mine, theirs], dim=1)
                for mine, theirs in zip(
                    vars(self).values(), vars(other).values(), strict=True
                )
            )
        )

    def only(self, kept: torch.Tensor) -> LiveSlots:
        """Some slots of every head; ``kept`` is int64 [Hkv, m]."""
        heads = torch.arange(len(kept))[:, None]
        return LiveSlots(*(field[heads, kept] for field in vars(self).values()))

    def without(self, victim: torch.Tensor) -> LiveSlots:
        """All but one slot of every head; ``victim`` is int64 [Hkv]."""
        heads, n = len(victim), len(self)
        keep = torch.arange(n).expand(heads, n) != victim[:, None]
        return LiveSlots(
            *(field[keep].unflatten(0, (heads, n - 1)) for field in vars(self).values())
        )


class EvictionRule(ABC):
    """Which slot the token at position t overwrites when the cache is full.

    Attributes:
        words: 32-bit words that a slot keeps of its key for later scores.
        projected_bits: Columns of the projection; 0 where nothing is hashed.

    """

    words: int = 0
    projected_bits: int = 0

    def __init__(self, policy: ResolvedKVPolicy) -> None:
        self.policy = policy

    @property
    @abstractmethod
    def kernel_code(self) -> int:
        """The kind of score, as kernels know it (`hashevict_vllm.kernels.codes`)."""

    @abstractmethod
    def score(
        self, q_bits: torch.Tensor, k_bits: torch.Tensor, slots: LiveSlots, t: int
    ) -> torch.Tensor:
        """How dispensable every slot is, before attention.

        Args:
            q_bits: bool [Hkv, G, b], signatures of the token's queries, by group.
            k_bits: bool [Hkv, b], signature of its key.
            slots: The n live slots.
            t: Position of the new token.

        Returns:
            int64 [Hkv, n], at least 0 and below 2^31; the largest is evicted.

        """

    def vote(
        self,
        q: torch.Tensor,
        slots: LiveSlots,
        projection: torch.Tensor,
        scale: float,
        decode: bool,
    ) -> None:
        """Let a query vote on slots, in place; its votes count from the next token on.

        Called for the tokens of `ResolvedKVPolicy.voters` only.

        Args:
            q: float32 [Hkv, G, D].
            slots: The n slots before the query's token.
            projection: float32 [D, b].
            scale: Softmax scale.
            decode: Whether the query is a decoding token's, and not a segment's.

        """
        raise TypeError(f"{type(self).__name__} takes no votes")

    def survivors(
        self, slots: LiveSlots, end: int, goes_on: bool
    ) -> torch.Tensor | None:
        """Reduce a segment that ends at position ``end`` by one selection.

        ``goes_on`` says whether the prompt does.

        Returns:
            int64 [Hkv, C], indices into ``slots``, ascending; None for rules that
            replay the decode rule token by token instead.

        """
        return None

    def victim(
        self, q_bits: torch.Tensor, k_bits: torch.Tensor, slots: LiveSlots, t: int
    ) -> torch.Tensor:
        """The unprotected slot of the largest score; ties go to the oldest position.

        Protected (design 1.2): positions below ``sinks`` and above ``t - 1 - recent``.

        Returns:
            int64 [Hkv], index into ``slots``.

        """
        position = slots.position
        oldest_last = self.policy.recent + 1
        protected = (position < self.policy.sinks) | (position > t - oldest_last)
        # Scores are small integers, so one number orders (score, age).
        key = self.score(q_bits, k_bits, slots, t) * 2**32 - position
        key[protected] = torch.iinfo(torch.int64).min
        return key.argmax(dim=1)
