"""L2 norm (Devoto et al., arXiv 2406.11430): keep keys of small norm."""

from __future__ import annotations

import torch

from hashevict_vllm.kernels import codes
from hashevict_vllm.policies.base import EvictionRule, LiveSlots


class L2Norm(EvictionRule):
    """The key of the largest norm is evicted: low norms attract attention."""

    words = 1

    @property
    def kernel_code(self) -> int:
        """See `EvictionRule.kernel_code`."""
        return codes.NORM

    def score(
        self, q_bits: torch.Tensor, k_bits: torch.Tensor, slots: LiveSlots, t: int
    ) -> torch.Tensor:
        """Squared norms, read as integers; see `EvictionRule.score`."""
        # Bits of non-negative floats order as the floats do.
        return slots.k.square().sum(-1).view(torch.int32).to(torch.int64)
