"""FastGen (Ge et al., arXiv 2310.01801): every head gets the policy that suits it."""

from __future__ import annotations

import torch

from hashevict_vllm.eval.offline.model import PromptLayer
from hashevict_vllm.eval.offline.rules.base import SINKS, Rule, top
from hashevict_vllm.eval.offline.slots import Kept, Slots, Step

LOCAL = 0.3
"""Share of the budget for recent tokens where both kinds are kept (the paper's r_l)."""

HYBRIDS = (
    (False, True, False),
    (True, True, False),
    (False, False, True),
    (True, False, True),
    (True, True, True),
)
"""Whether each keeps punctuation, recent tokens, frequent tokens; special ones all."""


class FastGen(Rule):
    """Per head, the hybrid of special, punctuation, frequent and local tokens.

    The paper takes the cheapest hybrid that recovers a given share of the prompt's
    attention map, so that its cache has no fixed size. At a fixed budget all hybrids,
    filled up to it, cost the same: the one that recovers most is taken. In decode,
    heads of local hybrids evict the oldest token, the others the least attended in sum;
    special tokens, punctuation and the first `SINKS` tokens stay.

    The flag of a head says that it goes by frequency.
    """

    label = "FastGen (offline)"
    sinks = SINKS

    @property
    def recent(self) -> int:
        """Protected in decode: a new token has no attention to show yet."""
        return int(LOCAL * self.budget)

    def keep(self, prompt: PromptLayer) -> Kept:
        """The best hybrid of every head."""
        n = min(self.budget, len(prompt))
        index, recovered, flag = self._hybrid(prompt, n, *HYBRIDS[0])
        for parts in HYBRIDS[1:]:
            other = self._hybrid(prompt, n, *parts)
            better = other[1] > recovered
            index = torch.where(better[:, None], other[0], index)
            recovered = torch.where(better, other[1], recovered)
            flag = torch.where(better, other[2], flag)
        stat = torch.where(flag[:, None], prompt.received, 0.0)
        stat = stat.masked_fill(prompt.special | prompt.punctuation, float("inf"))
        return Kept(index, stat.gather(1, index), flag)

    def _hybrid(
        self, prompt: PromptLayer, n: int, marks: bool, local: bool, frequent: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One hybrid, filled up to n tokens.

        Returns:
            The tokens it keeps, int64 [Hkv, n]; the attention of all of the prompt's
            queries that it recovers, each with its own recent tokens, float32 [Hkv];
            whether it goes by frequency, bool [Hkv].

        """
        got, position = prompt.received, torch.arange(len(prompt))
        always = prompt.special | (position < SINKS)
        if marks:
            always = always | prompt.punctuation
        window = 0
        if local:
            left = max(0, n - int(always.sum()))
            window = min(left, int(LOCAL * n)) if frequent else left
        score = got if frequent else position.expand_as(got).float()
        first = always | (position >= len(prompt) - window)
        index = top(score + first * (float(score.max()) + 1), n)
        columns = torch.zeros_like(got, dtype=torch.bool)
        if frequent:
            columns.scatter_(1, index, True)
        columns |= always
        age = position[:, None] - position
        covered = columns[:, None] | ((age >= 0) & (age < window))
        recovered = (self._attention(prompt) * covered).sum((1, 2))
        return index, recovered, torch.full_like(recovered, frequent, dtype=torch.bool)

    @staticmethod
    def _attention(prompt: PromptLayer) -> torch.Tensor:
        """Attention summed over the group, float32 [Hkv, T, T]; budgets share it."""
        if FastGen not in prompt.memo:
            prompt.memo[FastGen] = prompt.everything.sum(1)
        return prompt.memo[FastGen]

    def judge(
        self, prompt: PromptLayer
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Not used: `keep` chooses between several scores."""
        raise NotImplementedError

    def after(self, slots: Slots, weights: torch.Tensor, step: Step) -> None:
        """Accumulate, for heads that go by frequency."""
        slots.stat.add_(weights.sum(2) * slots.flag[..., None])
