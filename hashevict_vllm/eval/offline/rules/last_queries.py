"""SnapKV (Li et al., arXiv 2404.14469) at every token: the last queries decide."""

from __future__ import annotations

import torch
from torch.nn.functional import max_pool1d

from hashevict_vllm.eval.offline.model import PromptLayer
from hashevict_vllm.eval.offline.rules.base import Rule
from hashevict_vllm.eval.offline.slots import Slots, Step

WINDOW = 8
"""Queries that are asked; their own tokens stay (R-KV's observation tokens)."""

KERNEL = 7
"""Slots over which the largest attention counts (SnapKV's LongBench setting)."""


class LastQueries(Rule):
    """What the last queries attended to least goes, in decode as at the prompt's end.

    SnapKV as R-KV compares itself with it: mean attention of the last `WINDOW` queries,
    the largest of a query group, the largest of `KERNEL` neighbours among the live
    slots. They compress every 128 tokens; here every token pushes out one.
    """

    label = "SnapKV at every token (offline)"

    @property
    def recent(self) -> int:
        """The tokens of the queries that are asked."""
        return WINDOW

    def seen(self, prompt: PromptLayer) -> torch.Tensor:
        """See `Rule.seen`; the same for every budget."""
        if "last queries" not in prompt.memo:
            last = prompt.attention(min(WINDOW, len(prompt)))
            prompt.memo["last queries"] = last.amax(1)
        return prompt.memo["last queries"]

    def judge(self, prompt: PromptLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Rule.judge`."""
        stat = self.merit(self.seen(prompt), prompt.k)
        score = stat.clone()
        score[:, max(0, len(prompt) - WINDOW) :] = float("inf")
        return stat, score

    def merit(self, seen: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """How much tokens are worth.

        Args:
            seen: float32 [.., w, n], attention by the last queries, tokens in order.
            k: float32 [.., n, D], their keys.

        Returns:
            float32 [.., n].

        """
        return importance(seen)

    def after(self, slots: Slots, weights: torch.Tensor, step: Step) -> None:
        """The new query takes the place of the oldest; all are judged again."""
        rows = [slots.seen, weights.amax(2)[:, :, None]]
        slots.seen = torch.cat(rows, 2)[:, :, -WINDOW:]
        order = slots.position.argsort(-1)
        seen = slots.seen.gather(3, order[:, :, None].expand_as(slots.seen))
        k = slots.k.gather(2, order[..., None].expand_as(slots.k))
        slots.stat.scatter_(2, order, self.merit(seen, k))


def importance(seen: torch.Tensor) -> torch.Tensor:
    """Mean attention [.., n] by w queries [.., w, n], the largest of `KERNEL` slots."""
    mean = seen.mean(-2)
    pooled = max_pool1d(mean.flatten(0, -2), KERNEL, stride=1, padding=KERNEL // 2)
    return pooled.view_as(mean)
