"""StreamingLLM (arXiv 2309.17453): keep the sinks and the most recent tokens."""

from __future__ import annotations

import torch

from hashevict_vllm.kernels import codes
from hashevict_vllm.policies.base import EvictionRule, LiveSlots


class StreamingLLM(EvictionRule):
    """All scores are equal, so the tie rule evicts the oldest unprotected position.

    ``sinks`` are the paper's attention sinks; the rest of the budget is the window.
    """

    @property
    def kernel_code(self) -> int:
        """See `EvictionRule.kernel_code`."""
        return codes.RECENCY

    def score(
        self, q_bits: torch.Tensor, k_bits: torch.Tensor, slots: LiveSlots, t: int
    ) -> torch.Tensor:
        """Zeros; see `EvictionRule.score`."""
        return torch.zeros_like(slots.position)
