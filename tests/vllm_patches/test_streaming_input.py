"""Streaming-input sessions are refused, and nothing else suffers from it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.engine import engine, greedy, scheduler_of
from support.models import random_prompt

from hashevict_vllm.config import kv_policy
from hashevict_vllm.vllm_patches.streaming_input import SENTENCE

POLICY = {"budget": 128, "segment": 256}
SESSIONS = ((320, 200), (200, 150))
"""Inputs of two sessions; served side by side they ended the worker."""


def params(tokens: int = 8) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.CUMULATIVE,
    )


async def session(lengths: tuple[int, ...]) -> AsyncIterator[Any]:
    from vllm.engine.protocol import StreamingInput

    for number, length in enumerate(lengths):
        tokens = {"prompt_token_ids": random_prompt(length, number)}
        yield StreamingInput(prompt=tokens)


async def answer(llm: Any, prompt: Any, name: str, tokens: int = 8) -> list[int]:
    ids: list[int] = []
    async for output in llm.generate(prompt, params(tokens), name):
        ids = list(output.outputs[0].token_ids)
    return ids


async def sessions_beside_a_prompt(llm: Any, prompt: Any) -> tuple[list[Any], Any, Any]:
    """Errors of the sessions, the neighbour's tokens, and those of one after them."""
    neighbour = asyncio.create_task(answer(llm, prompt, "neighbour", 200))
    await asyncio.sleep(0.05)
    tasks = [answer(llm, session(s), f"s{i}") for i, s in enumerate(SESSIONS)]
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    return errors, await neighbour, await answer(llm, prompt, "after", 200)


def test_sessions_are_refused_and_their_neighbours_go_on(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.async_llm import AsyncLLM

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    prompt = {"prompt_token_ids": random_prompt(300)}
    with engine(llama, POLICY) as alone:
        expected = greedy(alone, [prompt["prompt_token_ids"]], 200)[0]

    async def served() -> tuple[list[Any], Any, Any]:
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(llama),
                dtype="float32",
                skip_tokenizer_init=True,
                enforce_eager=True,
                max_model_len=2048,
                block_size=32,
                max_num_seqs=4,
                kv_cache_memory_bytes=64 << 20,
                additional_config=kv_policy(**POLICY),
            )
        )
        try:
            return await sessions_beside_a_prompt(llm, prompt)
        finally:
            llm.shutdown()

    errors, neighbour, after = asyncio.run(served())
    for error in errors:
        assert isinstance(error, VLLMClientError)  # the server answers it with a 400
        assert str(error) == SENTENCE
    assert neighbour == after == expected


def hand_made(llm: Any) -> Any:
    """An `EngineCoreRequest` that says of itself that it is a part of a session."""
    request = llm.llm_engine.input_processor.process_inputs(
        "hand made",
        {"prompt_token_ids": random_prompt(100)},
        params(),
        supported_tasks=("generate",),
        resumable=True,
    )
    assert request.resumable
    return request


@pytest.mark.parametrize("door", ["engine", "core"])
def test_requests_made_by_hand_are_refused_and_leave_nothing(
    door: str, llama: Path
) -> None:
    from vllm.exceptions import VLLMValidationError

    with engine(llama, POLICY) as llm:
        core = llm.llm_engine.engine_core.engine_core
        request = hand_made(llm)
        enter = {
            "engine": lambda: llm.llm_engine.add_request(
                "hand made", request, params()
            ),
            # Where front ends arrive that are not written in Python.
            "core": lambda: core.preprocess_add_request(request),
        }[door]
        with pytest.raises(VLLMValidationError, match="Streaming input: a KV policy"):
            enter()
        assert not llm.llm_engine.has_unfinished_requests()
        assert not scheduler_of(llm).requests
        assert len(greedy(llm, [random_prompt(300)], 4)[0]) == 4


def test_without_a_policy_sessions_are_vllms_own(llama: Path) -> None:
    with engine(llama) as llm:
        core = llm.llm_engine.engine_core.engine_core
        request, _ = core.preprocess_add_request(hand_made(llm))
        assert request.resumable
