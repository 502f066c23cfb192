"""L2 norm (Devoto et al., arXiv 2406.11430): keep keys of small norm."""

from __future__ import annotations

import torch

from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.codes import NOT_A_NUMBER
from hashevict_vllm.policies.base import EvictionRule, LiveSlots


class L2Norm(EvictionRule):
    """The key of the largest norm is evicted: low norms attract attention.

    Of keys that are not finite those with a NaN go first, then those of infinite norm,
    which a finite key has too if its square is beyond float32.
    """

    words = 1

    @property
    def kernel_code(self) -> int:
        """See `EvictionRule.kernel_code`."""
        return codes.NORM

    def score(
        self, q_bits: torch.Tensor, k_bits: torch.Tensor, slots: LiveSlots, t: int
    ) -> torch.Tensor:
        """Squared norms, read as integers; see `EvictionRule.score`."""
        square = slots.k.square().sum(-1)
        # Bits of non-negative floats order as the floats do.
        bits = square.view(torch.int32).to(torch.int64)
        return torch.where(square.isnan(), NOT_A_NUMBER, bits)
