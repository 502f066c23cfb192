"""Scissorhands (Liu et al., arXiv 2305.17118): persistence of importance."""

from __future__ import annotations

import torch

from hashevict_vllm.eval.offline.model import PromptLayer
from hashevict_vllm.eval.offline.rules.base import Rule
from hashevict_vllm.eval.offline.slots import Slots, Step

HISTORY = 400
"""Queries of the prompt whose attention is counted (the paper's w)."""

RECENT = 10
"""Most recent tokens that stay (the paper's r)."""


class Scissorhands(Rule):
    """The tokens go that most often got less than the average attention 1 / t.

    Algorithm 2 with a drop amount of one: the budget stays full, where the paper drops
    half of it at a time. In decode counts go on growing; the paper counts afresh over
    the last `HISTORY` tokens at every compression. With grouped queries the mean
    attention of the group is compared. The statistic is minus the count.
    """

    label = "Scissorhands (offline)"

    @property
    def recent(self) -> int:
        """See `RECENT`."""
        return RECENT

    def judge(self, prompt: PromptLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Rule.judge`."""
        n, window = len(prompt), min(HISTORY, len(prompt))
        mean = prompt.everything[:, :, n - window :].mean(1)
        seen = torch.ones(window, n, dtype=torch.bool).tril(n - window)
        size = torch.arange(n - window + 1, n + 1)[:, None]
        stat = -((mean < 1 / size) & seen).sum(1).float()
        score = stat.clone()
        score[:, max(0, n - RECENT) :] = float("inf")
        return stat, score

    def after(self, slots: Slots, weights: torch.Tensor, step: Step) -> None:
        """Count who got less than the average over the live slots."""
        slots.stat.sub_((weights.mean(2) < 1 / weights.shape[-1]).float())
