"""The interface of an offline rule: it may look at exact attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from hashevict_vllm.eval.offline.model import PromptLayer
from hashevict_vllm.eval.offline.slots import Kept, Slots, Step

SINKS = 4
"""First tokens that prompt-only rules keep in decode: no method does without them."""


class Rule(ABC):
    """What is kept of a prompt, and what a new token overwrites in decode.

    Args:
        budget: C, live slots per KV head.

    Attributes:
        label: What reports call it.
        fresh: Statistic of a slot just written.
        sinks: Positions below this are not evicted in decode.

    """

    label: ClassVar[str]
    fresh: float = 0.0
    sinks: int = 0

    def __init__(self, budget: int) -> None:
        self.budget = budget

    @property
    def options(self) -> dict[str, Any]:
        """What its results are filed under: all that they depend on."""
        return {"name": "offline", "rule": self.label, "budget": self.budget}

    @property
    def recent(self) -> int:
        """The most recent tokens, not evicted in decode."""
        return 0

    def keep(self, prompt: PromptLayer) -> Kept:
        """What of a prompt is kept at its end; all of it if it fits."""
        stat, score, flag = self.judge(prompt)
        index = top(score, min(self.budget, len(prompt)))
        return Kept(index, stat.gather(1, index), flag)

    @abstractmethod
    def judge(
        self, prompt: PromptLayer
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Judge the tokens of a prompt.

        Returns:
            The statistics that decode goes on with, float32 [Hkv, T]; the scores of
            which the largest are kept, float32 [Hkv, T]; flags, bool [Hkv].

        """

    def victims(self, slots: Slots, step: Step) -> torch.Tensor:
        """Slots that the new token overwrites: lowest statistic, then oldest.

        Returns:
            int64 [R, Hkv].

        """
        return lowest(slots, self.sinks, self.recent, step.t)

    def after(  # noqa: B027 (optional)
        self, slots: Slots, weights: torch.Tensor, step: Step
    ) -> None:
        """Learn from the exact attention [R, Hkv, G, n] of the new token, itself in."""


class PromptOnly(Rule):
    """A method that says what to keep of a prompt and nothing of decode.

    New tokens push out the prompt tokens of the lowest score (as if the prompt had been
    cut to fewer), sinks excepted; once none is left, the oldest new token goes. The
    papers let the cache grow instead, which no fixed budget does.
    """

    fresh = float("inf")
    sinks = SINKS

    @abstractmethod
    def score(self, prompt: PromptLayer) -> torch.Tensor:
        """Scores of the tokens of a prompt, float32 [Hkv, T]; the largest are kept."""

    def judge(
        self, prompt: PromptLayer
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Rule.judge`; the same for every budget."""
        name = (type(self), self.label)
        if name not in prompt.memo:
            prompt.memo[name] = self.score(prompt)
        score = prompt.memo[name]
        return score, score, no_flags(prompt)


class Full(Rule):
    """The full cache: keeps everything."""

    label = "full (offline)"

    @property
    def options(self) -> dict[str, Any]:
        """Not those of the engine's full cache, which rounds otherwise."""
        return {"name": "full", "way": "offline"}

    def judge(
        self, prompt: PromptLayer
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Rule.judge`."""
        zeros = torch.zeros(prompt.k.shape[:2])
        return zeros, zeros, no_flags(prompt)


def no_flags(prompt: PromptLayer) -> torch.Tensor:
    """Flags [Hkv] of a rule that has none."""
    return torch.zeros(len(prompt.k), dtype=torch.bool)


def top(score: torch.Tensor, n: int) -> torch.Tensor:
    """Positions of the n largest scores [Hkv, T], ascending; ties keep the newer."""
    newest_first = score.flip(-1).argsort(dim=-1, descending=True, stable=True)
    return (score.shape[-1] - 1 - newest_first[:, :n]).sort(dim=-1).values


def lowest(slots: Slots, sinks: int, recent: int, t: int) -> torch.Tensor:
    """The unprotected slot [R, Hkv] of the lowest statistic; ties go to the oldest."""
    position = slots.position
    protected = (position < sinks) | (position > t - 1 - recent)
    # No statistic is NaN; a protected slot must lose to an infinite one as well.
    low = slots.stat.masked_fill(protected, float("inf")).amin(-1, keepdim=True)
    tied = (slots.stat == low) & ~protected
    return position.masked_fill(~tied, torch.iinfo(torch.int64).max).argmin(-1)
