"""FastGen (Ge et al., arXiv 2310.01801): every head gets the policy that suits it."""

from __future__ import annotations

import torch

from hashevict_vllm.eval.offline.model import PromptLayer
from hashevict_vllm.eval.offline.rules.base import SINKS, Rule, top
from hashevict_vllm.eval.offline.slots import Kept, Slots, Step

LOCAL = 0.3
"""Share of the budget for recent tokens where both kinds are kept (the paper's r_l)."""


class FastGen(Rule):
    """Per head, the hybrid of special, punctuation, frequent and local tokens.

    The paper takes the cheapest hybrid that recovers a given share of the attention
    map, so that its cache has no fixed size. At a fixed budget all hybrids, filled up
    to it, cost the same: the one that recovers most is taken. In decode, heads of
    local hybrids evict the oldest token, the others the least attended in sum;
    special tokens, punctuation and the first `SINKS` tokens stay.

    The flag of a head says that it goes by frequency.
    """

    label = "FastGen (offline)"
    sinks = SINKS

    @property
    def recent(self) -> int:
        """Protected in decode for all heads; local ones evict the oldest anyway."""
        return int(LOCAL * self.budget)

    def keep(self, prompt: PromptLayer) -> Kept:
        """The best hybrid of every head."""
        n = min(self.budget, len(prompt))
        got, best = prompt.received, None
        for score, frequent in self._hybrids(prompt):
            index = top(score, n)
            recovered = got.gather(1, index).sum(1)
            flag = torch.full_like(recovered, frequent, dtype=torch.bool)
            if best is None:
                best = index, recovered, flag
                continue
            better = recovered > best[1]
            best = (
                torch.where(better[:, None], index, best[0]),
                torch.where(better, recovered, best[1]),
                torch.where(better, flag, best[2]),
            )
        assert best is not None
        index, _, flag = best
        stat = torch.where(flag[:, None], got, 0.0)
        stat = stat.masked_fill(prompt.special | prompt.punctuation, float("inf"))
        return Kept(index, stat.gather(1, index), flag)

    def _hybrids(self, prompt: PromptLayer) -> list[tuple[torch.Tensor, bool]]:
        """Scores [Hkv, T] of every hybrid, cheapest first; whether by frequency."""
        n, got = len(prompt), prompt.received
        position = torch.arange(n)
        special = prompt.special | (position < SINKS)
        marks = special | prompt.punctuation
        local = (position / n).expand_as(got)
        near = position >= n - self.recent
        big = float(got.max()) + 1

        def put(score: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
            return score + first * big

        return [
            (put(local, special), False),
            (put(local, marks), False),
            (put(got, special), True),
            (put(got, marks), True),
            (put(put(got, marks), near), True),
        ]

    def judge(
        self, prompt: PromptLayer
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Not used: `keep` chooses between several scores."""
        raise NotImplementedError

    def after(self, slots: Slots, weights: torch.Tensor, step: Step) -> None:
        """Accumulate, for heads that go by frequency."""
        slots.stat.add_(weights.sum(2) * slots.flag[..., None])
