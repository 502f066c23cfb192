"""Patches the doors of an engine: sessions of streaming input are refused.

Such a session (``AsyncLLM.generate`` with a generator of `StreamingInput`, which
``/v1/realtime`` uses) lengthens the prompt of a request that has begun to generate
(``Scheduler._update_request_as_session``). What a budgeted request holds follows from
one prompt length, at whose end its cache is reduced and its scratch given back.

Where: ``AsyncLLM.add_request`` and ``LLMEngine.add_request``, before anything of the
request is stored; and ``EngineCore.preprocess_add_request``, for front ends that are
not Python's: there vLLM fails the one request and goes on.

Upstream fix: patches/*/streaming_input.patch, ``streaming_input_checks``.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator
from typing import Any

SENTENCE = (
    "Streaming input: a KV policy reduces the cache when a prompt ends, and a session "
    "would lengthen its prompt afterwards; send all of it as one prompt, or serve with "
    "--kv-policy full."
)


def refuse_sessions(vllm_config: Any) -> None:
    """Refuse a session of streaming input where a policy is on.

    Raises:
        VLLMValidationError: vLLM's own for requests that it cannot serve, which becomes
            a 400, or the error event of a websocket.

    """
    from vllm.exceptions import VLLMValidationError

    from hashevict_vllm.config import policy_of

    if policy_of(vllm_config.additional_config).enabled:
        raise VLLMValidationError(SENTENCE)


def in_vllm() -> bool:
    """Whether vLLM lets plugins refuse streaming input."""
    from vllm.v1 import engine

    return hasattr(engine, "streaming_input_checks")


def apply() -> None:
    """Patch once per process."""
    from vllm.v1 import engine
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.llm_engine import LLMEngine

    if in_vllm():
        if refuse_sessions not in engine.streaming_input_checks:
            engine.streaming_input_checks.append(refuse_sessions)
    # `request_checks` wraps the core's method, too.
    elif not hasattr(LLMEngine.add_request, "hashevict_stock"):
        AsyncLLM.add_request = _checked_async(AsyncLLM.add_request)
        LLMEngine.add_request = _checked(LLMEngine.add_request)
        EngineCore.preprocess_add_request = _checked_core(
            EngineCore.preprocess_add_request
        )


def _is_session(prompt: Any) -> bool:
    """A generator of inputs, or an ``EngineCoreRequest`` that is a part of one."""
    return isinstance(prompt, AsyncGenerator) or getattr(prompt, "resumable", False)


def _checked_async(stock: Any) -> Any:
    @functools.wraps(stock)
    async def add_request(
        self: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if _is_session(prompt):
            refuse_sessions(self.vllm_config)
        return await stock(self, request_id, prompt, *args, **kwargs)

    return add_request


def _checked(stock: Any) -> Any:
    @functools.wraps(stock)
    def add_request(
        self: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if _is_session(prompt):
            refuse_sessions(self.vllm_config)
        return stock(self, request_id, prompt, *args, **kwargs)

    add_request.hashevict_stock = stock  # type: ignore[attr-defined]
    return add_request


def _checked_core(stock: Any) -> Any:
    @functools.wraps(stock)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        if _is_session(request):
            refuse_sessions(self.vllm_config)
        return stock(self, request)

    return preprocess_add_request
