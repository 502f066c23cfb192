"""Patches the API's front end: ``usage`` says how many tokens a request evicted.

Where: ``AsyncLLM.generate`` in ``vllm/v1/engine/async_llm.py``, whose callers are the
routes' tasks, so that a context variable ties what it yields to the HTTP call; and
``UsageInfo`` in ``vllm/entrypoints/serve/engine/protocol.py``, which every route of
completions and chats makes from plain counts, and which allows further fields. Why
there: nothing else that is the engine's reaches ``usage``. ``/v1/responses`` makes
OpenAI's own class of usage, which has no further fields.

Upstream fix: patches/*/usage.patch, ``AsyncLLM.generate_wrappers`` and
``UsageInfo.more_fields``.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator
from typing import Any


def in_vllm() -> bool:
    """Whether vLLM has both extension points."""
    from vllm.v1.engine.async_llm import AsyncLLM

    return hasattr(AsyncLLM, "generate_wrappers")


def apply() -> None:
    """Patch once per process."""
    from vllm.entrypoints.serve.engine.protocol import UsageInfo
    from vllm.v1.engine.async_llm import AsyncLLM

    if in_vllm():
        if _counted not in AsyncLLM.generate_wrappers:
            AsyncLLM.generate_wrappers.append(_counted)
            UsageInfo.more_fields.append(_usage_fields)
    elif not hasattr(AsyncLLM.generate, "hashevict_stock"):
        AsyncLLM.generate = _counting(AsyncLLM.generate)
        UsageInfo.__init__ = _with_fields(UsageInfo.__init__)


def _counted(engine: Any, sampling_params: Any, outputs: Any) -> Any:
    # Imported when called: vLLM must have been imported as a whole.
    from hashevict_vllm.metrics.usage import counted

    return counted(engine, sampling_params, outputs)


def _usage_fields() -> dict[str, int]:
    from hashevict_vllm.metrics.usage import usage_fields

    return usage_fields()


def _counting(stock: Any) -> Any:
    @functools.wraps(stock)
    def generate(
        self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        outputs = stock(self, prompt, sampling_params, *args, **kwargs)
        return _counted(self, sampling_params, outputs)

    generate.hashevict_stock = stock  # type: ignore[attr-defined]
    return generate


def _with_fields(stock: Any) -> Any:
    @functools.wraps(stock)
    def __init__(self: Any, **data: Any) -> None:
        stock(self, **data, **_usage_fields())

    return __init__
