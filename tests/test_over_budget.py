"""Over budget, the served engine equals the float32 oracle token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.engine import engine, greedy
from support.models import random_prompt
from support.oracle import Oracle, resolve

PROMPTS = [random_prompt(n) for n in (20, 150, 333, 700)]

CASES: dict[str, tuple[dict[str, Any], int]] = {
    "budget a multiple of the block": ({"budget": 192}, 32),
    "budget off the block": ({"budget": 201, "segment": 64}, 32),
    "large blocks": ({"budget": 201}, 128),
    "8 bits": ({"budget": 160, "hash_bits": 8, "segment": 64}, 32),
    "16 bits, paper": ({"budget": 160, "preset": "paper", "segment": 64}, 32),
    "128 bits": ({"budget": 160, "hash_bits": 128, "segment": 64}, 32),
    "key as hash source": ({"budget": 201, "preset": "reference"}, 32),
    "whole prompt held": ({"budget": 201, "segment": "prompt"}, 32),
    "whole prompt held, large blocks": ({"budget": 192, "segment": "prompt"}, 128),
    "no protection": ({"budget": 100, "sinks": 0, "recent": 0, "segment": 32}, 32),
}


@pytest.mark.parametrize("case", CASES)
def test_engine_equals_oracle_with_grouped_queries(
    case: str, llama: Path, llama_oracle: Oracle
) -> None:
    check(llama, llama_oracle, *CASES[case])


@pytest.mark.parametrize(
    "case", ["budget off the block", "16 bits, paper", "whole prompt held"]
)
def test_engine_equals_oracle_with_one_query_head_per_kv_head(
    case: str, llama_mha: Path, llama_mha_oracle: Oracle
) -> None:
    check(llama_mha, llama_mha_oracle, *CASES[case])


def test_engine_equals_oracle_token_by_token(
    llama: Path, llama_oracle: Oracle
) -> None:
    prompts = [random_prompt(n) for n in (60, 180)]
    check(llama, llama_oracle, {"budget": 100, "segment": 1}, 32, prompts)


def test_segments_of_one_differ_from_longer_ones(
    llama: Path, llama_oracle: Oracle
) -> None:
    prompt = random_prompt(180)
    one = llama_oracle.greedy(prompt, resolve({"budget": 100, "segment": 1}), 50)
    more = llama_oracle.greedy(prompt, resolve({"budget": 100, "segment": 64}), 50)
    assert one != more


def check(
    model: Path,
    oracle: Oracle,
    policy: dict[str, Any],
    block_size: int,
    prompts: list[list[int]] = PROMPTS,
) -> None:
    resolved = resolve(policy, block_size)
    expected = [oracle.greedy(prompt, resolved) for prompt in prompts]
    with engine(model, policy, block_size=block_size) as llm:
        assert greedy(llm, prompts) == expected
