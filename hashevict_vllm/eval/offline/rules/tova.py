"""TOVA (Oren et al., arXiv 2401.06104): the least attended by the last query goes."""

from __future__ import annotations

import torch

from hashevict_vllm.eval.offline.model import PromptLayer
from hashevict_vllm.eval.offline.rules.base import Rule, no_flags
from hashevict_vllm.eval.offline.slots import Slots, Step


class TOVA(Rule):
    """Attention of the last query, averaged over all heads of the layer.

    All heads keep the same tokens. The paper evicts after attention; here what the last
    query thought decides before the next one attends, so that the budget holds.
    """

    label = "TOVA (offline)"

    def judge(
        self, prompt: PromptLayer
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Rule.judge`."""
        last = prompt.attention(1).mean(dim=(0, 1, 2))
        score = last.expand(len(prompt.k), -1)
        return score, score, no_flags(prompt)

    def after(self, slots: Slots, weights: torch.Tensor, step: Step) -> None:
        """Only the last query counts."""
        slots.stat.copy_(weights.mean(dim=(1, 2))[:, None].expand_as(slots.stat))
