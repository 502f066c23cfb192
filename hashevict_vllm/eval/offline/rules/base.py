"""The interface of an offline rule: it may look at exact attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from hashevict_vllm.eval.offline.model import PromptLayer
from hashevict_vllm.eval.offline.slots import Slots, Step

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
    def digest(self) -> str | None:
        """Of a served rule's source, where it decides here (`rule_digest`)."""
        return None

    @property
    def recent(self) -> int:
        """The most recent tokens, not evicted in decode."""
        return 0

    def keep(self, prompt: PromptLayer) -> Slots:
        """What of a prompt is kept at its end, R = 1; all of it if it fits."""
        stat, score = self.judge(prompt)
        index = top(score, min(self.budget, len(prompt)))
        return Slots.chosen(prompt.k, prompt.v, index, stat, self.seen(prompt))

    def seen(self, prompt: PromptLayer) -> torch.Tensor | None:
        """Attention that `Slots` keep: float32 [Hkv, w, T]; None for w = 0."""
        return None

    @abstractmethod
    def judge(self, prompt: PromptLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """Judge the tokens of a prompt.

        Returns:
            The statistics that decode goes on with, float32 [Hkv, T]; the scores of
            which the largest are kept, float32 [Hkv, T].

        """

    def step(self, slots: Slots, step: Step) -> torch.Tensor:
        """Append or evict, then attend; float32 [R, Hkv, G, D]."""
        if len(slots) < self.budget:
            slots.append(step, self.fresh)
        else:
            slots.overwrite(self.victims(slots, step), step, self.fresh)
        logits = step.q @ slots.k.transpose(-1, -2)
        weights = logits.mul_(step.scale).softmax(-1)
        self.after(slots, weights, step)
        return weights @ slots.v

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

    def judge(self, prompt: PromptLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Rule.judge`; the same for every budget."""
        name = (type(self), self.label)
        if name not in prompt.memo:
            prompt.memo[name] = self.score(prompt)
        score = prompt.memo[name]
        return score, score


class Full(Rule):
    """The full cache: keeps everything."""

    label = "full (offline)"

    @property
    def options(self) -> dict[str, Any]:
        """Not those of the engine's full cache, which rounds otherwise."""
        return {"name": "full", "way": "offline"}

    def judge(self, prompt: PromptLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Rule.judge`."""
        zeros = torch.zeros(prompt.k.shape[:2])
        return zeros, zeros


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
