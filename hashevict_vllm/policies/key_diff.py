"""KeyDiff (Park et al., arXiv 2504.15364): keep keys that differ from the mean."""

from __future__ import annotations

import torch

from hashevict_vllm.kernels import codes
from hashevict_vllm.policies.base import EvictionRule, LiveSlots


class KeyDiff(EvictionRule):
    """The key most similar to the mean direction of the live keys is evicted.

    Reads every live key at every step: a baseline for quality, not for speed.
    """

    @property
    def kernel_code(self) -> int:
        """See `EvictionRule.kernel_code`."""
        return codes.KEY_DIFF

    def score(
        self, q_bits: torch.Tensor, k_bits: torch.Tensor, slots: LiveSlots, t: int
    ) -> torch.Tensor:
        """Cosines with the mean direction, in steps of 2^-29; see the base class."""
        unit = torch.nn.functional.normalize(slots.k, dim=-1)
        mean = torch.nn.functional.normalize(unit.mean(dim=1, keepdim=True), dim=-1)
        cosine = (unit * mean).sum(-1)
        return ((cosine + 1) * 2.0**29).to(torch.int64)
