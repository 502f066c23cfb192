"""How many tokens a request has kept and lost, from token counts alone.

As on the worker (`hashevict_vllm.plan`), nothing has to be asked of the
cache: how many slots are live follows from how many tokens were written. Every KV head
of every layer evicts one token where another does, so one number serves them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hashevict_vllm.request_budget import asked_budget


@dataclass(frozen=True)
class Progress:
    """How far one request was before and after one output of the engine.

    Attributes:
        request_id: The engine's id of the request.
        prompt_len: Tokens of the prompt.
        before: Tokens whose K/V had been written when the output before was made; 0
            before the first.
        after: The same now: the prompt, and all but the newest of the output.
        preemptions: Times that the request was preempted between the two.
        budget: C that the request asks for; None for the server's.

    """

    request_id: str
    prompt_len: int
    before: int
    after: int
    preemptions: int = 0
    budget: int | None = None

    @classmethod
    def of(
        cls,
        request_id: str,
        prompt_len: int,
        generated: int,
        new: int,
        preempted: int,
        extra_args: Mapping[str, Any] | None = None,
    ) -> Progress:
        """The progress of an output.

        Args:
            request_id: The engine's id of the request.
            prompt_len: Tokens of the prompt.
            generated: Tokens generated so far.
            new: Those of them that are new.
            preempted: Preemptions since the output before.
            extra_args: Of the request, its budget among them.

        """
        earlier = generated - new
        before = prompt_len + earlier - 1 if earlier else 0
        after, budget = prompt_len + generated - 1, asked_budget(extra_args)
        return cls(request_id, prompt_len, before, after, preempted, budget)


def evicted_tokens(budget: int, prompt_len: int, tokens: int) -> tuple[int, int]:
    """Tokens of the prompt's and of the output's phase that a KV head has evicted.

    Args:
        budget: C.
        prompt_len: Tokens of the prompt.
        tokens: Tokens whose K/V have been written, the whole prompt among them.

    Returns:
        Evictions while the prompt was read, and after it.

    """
    in_prompt = max(min(prompt_len, tokens) - budget, 0)
    return in_prompt, max(tokens - budget, 0) - in_prompt


def live_slots(budget: int, tokens: int) -> int:
    """Slots per KV head that hold a token, after the prompt."""
    return min(tokens, budget)


def kept_ratio(budget: int, tokens: int) -> float:
    """Share of a request's tokens that its cache still holds; 1 below the budget."""
    return live_slots(budget, tokens) / tokens if tokens else 1.0
