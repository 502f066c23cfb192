"""How many tokens the answers of one HTTP request have evicted, for its ``usage``.

One call of the API may be several requests of the engine (prompts, ``n``), read by
tasks of their own, and a stream is read by another task than the one that asked. All of
them inherit the context of the call, where `CountedCalls` puts their `Tally`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from hashevict_vllm.config import policy_of
from hashevict_vllm.host import resolve
from hashevict_vllm.metrics.counts import evicted_tokens
from hashevict_vllm.request_budget import asked_budget

FIELD = "evicted_tokens"
"""Of ``usage`` in a response."""


class Tally:
    """Tokens evicted so far."""

    def __init__(self) -> None:
        self.evicted = 0


_TALLY: ContextVar[Tally] = ContextVar("hashevict_tally")


class CountedCalls:
    """ASGI middleware: every HTTP request has a `Tally` from its beginning.

    Args:
        app: What it wraps.

    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request, or whatever else a server does."""
        before = _TALLY.set(Tally())
        try:
            await self._app(scope, receive, send)
        finally:
            _TALLY.reset(before)


def usage_fields() -> dict[str, int]:
    """What ``usage`` says besides, in the context of a call; else nothing."""
    tally = _TALLY.get(None)
    return {} if tally is None else {FIELD: tally.evicted}


def counted(
    engine: Any, sampling_params: Any, outputs: AsyncGenerator[Any, None]
) -> AsyncGenerator[Any, None]:
    """The outputs of ``AsyncLLM.generate``, counted for the call that asks.

    Outside of a call nothing is counted, nor where no policy is on: there is no tally.

    Args:
        engine: The `AsyncLLM`.
        sampling_params: Of the request.
        outputs: What ``generate`` returned, `RequestOutput` by `RequestOutput`.

    """
    tally = _TALLY.get(None)
    return outputs if tally is None else _count(engine, outputs, tally, sampling_params)


def _budget_of(engine: Any) -> int:
    """The server's budget; there is a tally only where a policy is on."""
    if not hasattr(engine, "hashevict_budget"):
        policy = policy_of(engine.vllm_config.additional_config)
        engine.hashevict_budget = resolve(policy, engine.vllm_config).budget
    return int(engine.hashevict_budget)


async def _count(
    engine: Any, outputs: AsyncGenerator[Any, None], tally: Tally, params: Any
) -> AsyncGenerator[Any, None]:
    from vllm.sampling_params import RequestOutputKind

    delta = params.output_kind == RequestOutputKind.DELTA
    generated: dict[int, int] = {}
    evicted: dict[int, int] = {}
    prompt_len, budget = 0, None
    async with aclosing(outputs):
        async for output in outputs:
            if budget is None:  # until there is an output, it may be refused
                asked = asked_budget(params.extra_args)
                budget = _budget_of(engine) if asked is None else asked
            prompt_len = len(output.prompt_token_ids or ()) or prompt_len
            for choice in output.outputs:
                earlier = generated.get(choice.index, 0) if delta else 0
                number = generated[choice.index] = earlier + len(choice.token_ids)
                # The newest token has not been written yet.
                now = sum(evicted_tokens(budget, prompt_len, prompt_len + number - 1))
                tally.evicted += now - evicted.get(choice.index, 0)
                evicted[choice.index] = now
            yield output
