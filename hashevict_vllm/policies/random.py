"""Random eviction: the floor that any rule has to beat."""

from __future__ import annotations

import torch

from hashevict_vllm.kernels import codes
from hashevict_vllm.policies.base import EvictionRule, LiveSlots


def _low(x: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of int64 values."""
    return x & 0xFFFFFFFF


class Random(EvictionRule):
    """A pseudo-random unprotected slot, by a hash of (seed, step, position).

    Equal for all heads and layers, and reproducible on every rank and in a replay.
    """

    @property
    def kernel_code(self) -> int:
        """See `EvictionRule.kernel_code`."""
        return codes.RANDOM

    def score(
        self, q_bits: torch.Tensor, k_bits: torch.Tensor, slots: LiveSlots, t: int
    ) -> torch.Tensor:
        """Mixed bits, as the kernels mix them; see `EvictionRule.score`."""
        h = _low(slots.position * 0x9E3779B1)
        h = h ^ _low(torch.tensor(t * 0x85EBCA77))
        h = h ^ _low(torch.tensor(self.policy.seed * 0xC2B2AE3D))
        h = _low((h ^ (h >> 15)) * 0x2C1B3C6D)
        h = _low((h ^ (h >> 12)) * 0x297A2D39)
        return (h ^ (h >> 15)) & 0x7FFFFFFF
