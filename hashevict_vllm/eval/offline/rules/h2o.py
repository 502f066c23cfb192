"""H2O (Zhang et al., arXiv 2306.14048): heavy hitters and a recent window."""

from __future__ import annotations

import torch

from hashevict_vllm.eval.offline.model import PromptLayer
from hashevict_vllm.eval.offline.rules.base import Rule
from hashevict_vllm.eval.offline.slots import Slots, Step


class H2O(Rule):
    """Half of the budget for the recent, half for the most attended in sum.

    The prompt's queries all count, as in the authors' code; in decode the slot with the
    least accumulated attention goes (algorithm 1). With grouped queries the attention
    of the group is summed.
    """

    label = "H2O (offline)"

    @property
    def recent(self) -> int:
        """Half of the budget, as in the paper's experiments."""
        return self.budget // 2

    def judge(self, prompt: PromptLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Rule.judge`."""
        score = prompt.received.clone()
        score[:, max(0, len(prompt) - self.recent) :] = float("inf")
        return prompt.received, score

    def after(self, slots: Slots, weights: torch.Tensor, step: Step) -> None:
        """Accumulate."""
        slots.stat.add_(weights.sum(2))
