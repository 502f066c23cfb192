"""Requests with budgets of their own, in one batch: each gets what it gets alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engine import engine, generate, greedy, scheduler_of
from support.models import random_prompt
from support.oracle import Oracle, resolve
from test_invariance import count_preemptions
from vllm.exceptions import VLLMValidationError

from hashevict_vllm.request_budget import FULL, KEY, asked_budget, policy_with

POLICY = {"budget": 201, "segment": 64, "allow_full": True}
TOKENS = 60
BLOCKS = 28
ROOM = (BLOCKS - 1) * 32
CASES: tuple[tuple[int, int, Any], ...] = (  # tokens of the prompt, seed, budget
    (700, 6, FULL),
    (150, 1, 96),
    (20, 0, 64),
    (333, 1, None),
    (333, 1, "128"),
    (700, 6, 177),
)


def prompts() -> list[list[int]]:
    return [random_prompt(length, seed) for length, seed, _ in CASES]


@pytest.fixture(scope="module")
def stock(llama: Path) -> list[list[int]]:
    """What stock vLLM answers to the first prompt; one engine at a time."""
    with engine(llama) as llm:
        return greedy(llm, prompts()[:1], TOKENS)


@pytest.fixture(scope="module")
def served(llama: Path, stock: list[list[int]]) -> Iterator[Any]:
    options = {"max_num_seqs": 4, "num_gpu_blocks_override": BLOCKS}
    options |= {"max_model_len": 2048, "max_num_batched_tokens": 256}
    with engine(llama, POLICY, enable_prefix_caching=True, **options) as llm:
        yield llm


def answer(oracle: Oracle, prompt: list[int], budget: Any) -> list[int]:
    """The oracle's, with a request's budget for the server's."""
    policy = policy_with(resolve(POLICY), asked_budget({KEY: budget}))
    return oracle.greedy(prompt, policy, TOKENS)


@pytest.fixture(scope="module")
def expected(llama_oracle: Oracle) -> list[list[int]]:
    budgets = [budget for _, _, budget in CASES]
    return [answer(llama_oracle, *of) for of in zip(prompts(), budgets, strict=True)]


def test_a_batch_of_budgets_equals_the_oracle_of_each(
    served: Any, expected: list[list[int]]
) -> None:
    """In a pool that is too small for all, so that some are preempted."""
    budgets = [budget for _, _, budget in CASES]
    preempted = count_preemptions(served)
    assert greedy(served, prompts(), TOKENS, budgets) == expected
    assert sum(preempted.values()) > 0


def test_cached_prefixes_serve_requests_of_other_budgets(
    served: Any, llama_oracle: Oracle
) -> None:
    served.reset_prefix_cache()
    prompt, cached = random_prompt(333, 2), []
    for budget in (96, 64, 96, 64, FULL):
        (output,) = generate(served, [prompt], TOKENS, [budget])
        tokens = list(output.outputs[0].token_ids)
        assert tokens == answer(llama_oracle, prompt, budget)
        cached.append(output.num_cached_tokens)
    # Raw blocks serve all, as far as a request's own first vote; a state that is
    # reduced, the last within the prompt, serves requests of its budget alone.
    assert cached == [0, 96, 320, 320, 128]


def test_full_is_what_stock_vllm_generates(
    stock: list[list[int]], expected: list[list[int]]
) -> None:
    assert stock == expected[:1]


REFUSED: dict[Any, str] = {
    "little": "kv_budget: expected tokens or 'full', got 'little'.",
    "25%": "kv_budget: expected tokens or 'full', got '25%'.",
    48.5: "kv_budget: expected an integer, got 48.5.",
    True: "kv_budget: expected an integer, got True.",
    46: "kv_budget: must be at least 47, got 46.",
    -1: "kv_budget: must be at least 47, got -1.",
    202: "kv_budget: must be at most 201.",
    2**40: "kv_budget: must be at most 201.",
}


@pytest.mark.parametrize("value", REFUSED)
def test_a_bad_budget_is_refused_in_one_sentence(value: Any, served: Any) -> None:
    with pytest.raises(VLLMValidationError) as error:
        generate(served, prompts()[:2], TOKENS, [value, None])
    assert str(error.value) == REFUSED[value]
    assert not scheduler_of(served).requests


def test_full_is_refused_where_it_would_not_fit(served: Any) -> None:
    long = random_prompt(ROOM - TOKENS + 1)
    sentence = f"^kv_budget: 'full' with .* of {ROOM + 1} tokens .* the {ROOM} that"
    with pytest.raises(VLLMValidationError, match=sentence):
        generate(served, [long], TOKENS, [FULL])
    (answer,) = greedy(served, [long[:-1]], TOKENS, [FULL])
    assert len(answer) == TOKENS


def test_the_smallest_budget_is_served(served: Any) -> None:
    (answer,) = greedy(served, prompts()[:1], TOKENS, [47])
    assert len(answer) == TOKENS
