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

from hashevict_vllm.request_budget import FULL, KEY, asked_budget, policy_with

POLICY = {"budget": 201, "segment": 64, "allow_full": True}
TOKENS = 60
BLOCKS = 40
ROOM = (BLOCKS - 1) * 32
CASES: tuple[tuple[int, int, Any], ...] = (  # tokens of the prompt, seed, budget
    (333, 1, None),
    (150, 1, 96),
    (333, 1, "128"),
    (700, 5, FULL),
    (20, 0, 64),
    (700, 5, 177),
)


def prompts() -> list[list[int]]:
    return [random_prompt(length, seed) for length, seed, _ in CASES]


@pytest.fixture(scope="module")
def served(llama: Path) -> Iterator[Any]:
    options = {"max_num_seqs": 4, "num_gpu_blocks_override": BLOCKS}
    options |= {"max_model_len": 2048, "max_num_batched_tokens": 256}
    with engine(llama, POLICY, enable_prefix_caching=True, **options) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(llama_oracle: Oracle) -> list[list[int]]:
    """Of the oracle, with every request's budget for the server's."""
    policy, answers = resolve(POLICY), []
    for prompt, (_, _, budget) in zip(prompts(), CASES, strict=True):
        own = policy_with(policy, asked_budget({KEY: budget}))
        answers.append(llama_oracle.greedy(prompt, own, TOKENS))
    return answers


def test_a_batch_of_budgets_equals_the_oracle_of_each(
    served: Any, expected: list[list[int]]
) -> None:
    """In a pool that is too small for all, so that some are preempted."""
    budgets = [budget for _, _, budget in CASES]
    preempted = count_preemptions(served)
    assert greedy(served, prompts(), TOKENS, budgets) == expected
    assert sum(preempted.values()) > 0


def test_cached_prefixes_serve_requests_of_other_budgets(
    served: Any, expected: list[list[int]]
) -> None:
    served.reset_prefix_cache()
    tokens, cached = [], []
    for i in (0, 2, 0, 2, 3, 5, 5):
        (output,) = generate(served, [prompts()[i]], TOKENS, [CASES[i][2]])
        tokens.append(list(output.outputs[0].token_ids))
        cached.append(output.num_cached_tokens)
    assert tokens == [expected[i] for i in (0, 2, 0, 2, 3, 5, 5)]
    # Raw blocks serve all, as far as a request's own first vote; a state that is
    # reduced, the longest within a prompt, serves requests of its budget alone.
    assert cached == [0, 160, 320, 320, 0, 160, 640]


def test_full_is_what_stock_vllm_generates(
    llama: Path, expected: list[list[int]]
) -> None:
    with engine(llama) as stock:
        assert greedy(stock, [prompts()[3]], TOKENS) == [expected[3]]


REFUSED: dict[Any, str] = {
    "little": "kv_budget: expected tokens or 'full', got 'little'.",
    "25%": "kv_budget: expected tokens or 'full', got '25%'.",
    48.5: "kv_budget: expected an integer, got 48.5.",
    True: "kv_budget: expected an integer, got True.",
    46: "kv_budget: must be at least 47, got 46.",
    -1: "kv_budget: must be at least 47, got -1.",
    202: "kv_budget: must be at most 201.",
    10**30: "kv_budget: must be at most 201.",
}


@pytest.mark.parametrize("value", REFUSED)
def test_a_bad_budget_is_refused_in_one_sentence(value: Any, served: Any) -> None:
    with pytest.raises(ValueError, match=r"^kv_budget: ") as error:
        generate(served, prompts()[:2], TOKENS, [value, None])
    assert str(error.value) == REFUSED[value]
    assert not scheduler_of(served).requests


def test_full_is_refused_where_it_would_not_fit(served: Any) -> None:
    long = random_prompt(ROOM - TOKENS + 1)
    with pytest.raises(ValueError, match=f"^kv_budget: 'full' with .* {ROOM + 1} "):
        generate(served, [long], TOKENS, [FULL])
    (answer,) = greedy(served, [long[:-1]], TOKENS, [FULL])
    assert len(answer) == TOKENS


def test_the_smallest_budget_is_served(served: Any) -> None:
    (answer,) = greedy(served, prompts()[:1], TOKENS, [47])
    assert len(answer) == TOKENS
