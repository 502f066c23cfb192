"""KeyDiff (Park et al., arXiv 2504.15364): keep keys that differ from the mean."""

from __future__ import annotations

import torch

from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.codes import NO_DIRECTION, SHORTEST
from hashevict_vllm.policies.base import EvictionRule, LiveSlots


class KeyDiff(EvictionRule):
    """The key most similar to the mean direction of the live keys is evicted.

    Keys that are not finite, or too long for float32, have no direction: they are no
    part of the mean, and go first. Keys of zeros are similar to nothing, cosine 0.

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
        has_direction = slots.k.square().sum(-1).isfinite()
        k = torch.where(has_direction[..., None], slots.k, 0.0)
        unit = torch.nn.functional.normalize(k, dim=-1, eps=SHORTEST)
        mean = torch.nn.functional.normalize(unit.mean(dim=1, keepdim=True), dim=-1)
        cosine = (unit * mean).sum(-1)
        score = ((cosine + 1) * 2.0**29).to(torch.int64)
        return torch.where(has_direction, score, NO_DIRECTION)
