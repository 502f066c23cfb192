"""Over budget, the served engine equals the float32 oracle token for token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.engine import engine, greedy
from support.models import random_prompt
from support.oracle import Oracle, resolve

LENGTHS = (20, 150, 333, 700)
"""Prompts shorter and longer than the budgets below; 300 tokens follow each."""

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_mha": {"num_attention_heads": 2, "head_dim": 64},
}


@dataclass(frozen=True)
class Case:
    """A policy on a model."""

    name: str
    policy: dict[str, Any]
    block_size: int = 32
    model: str = "llama"
    lengths: tuple[int, ...] = LENGTHS


RARELY = {"vote_every": 8}
"""As large budgets do by default; and the oracle is quicker."""

INSTANT = {"scoring": "instant", "segment": 64}

CASES = (
    Case("default", {"budget": 201}, lengths=(20, 333)),
    Case("budget a multiple of the block", {**RARELY, "budget": 192}, 64),
    Case("large blocks", {**RARELY, "budget": 201}, 128),
    Case("segments", {**RARELY, "budget": 201, "segment": 64}),
    Case("long segments", {**RARELY, "budget": 192, "segment": 256}),
    Case("8 bits", {**RARELY, "budget": 160, "hash_bits": 8, "segment": 64}),
    Case("128 bits", {**RARELY, "budget": 160, "hash_bits": 128}),
    Case(
        "no sinks",
        {
            **RARELY,
            "budget": 96,
            "sinks": 0,
            "recent": 8,
            "segment": 32,
            "orthogonal": False,
        },
    ),
    Case(
        "every query votes",
        {
            **{"vote_every": 1, "decay": 0.85},
            **{"budget": 160, "window": 64, "pool": 1, "segment": 128},
        },
    ),
    Case("token by token", {**RARELY, "budget": 100, "segment": 1}, lengths=(60, 180)),
    Case("paper", {"budget": 160, "preset": "paper", "segment": 64}),
    Case("reference", {"budget": 201, "preset": "reference", "segment": 256}),
    Case("instant", {**INSTANT, "budget": 201}),
    Case("instant, 128 bits", {**INSTANT, "budget": 160, "hash_bits": 128}, 64),
    Case("instant, prompt held", {**INSTANT, "budget": 192, "segment": "prompt"}, 128),
    Case(
        "instant, no protection",
        {"scoring": "instant", "budget": 96, "sinks": 0, "recent": 0, "segment": 32},
    ),
    Case(
        "instant, token by token",
        {"scoring": "instant", "budget": 100, "segment": 1},
        lengths=(60, 180),
    ),
    Case("one query head", {**RARELY, "budget": 201}, model="llama_mha"),
    Case(
        "one query head, segments",
        {**RARELY, "budget": 160, "segment": 64},
        model="llama_mha",
    ),
    Case(
        "one query head, reference",
        {"budget": 160, "preset": "reference", "segment": 64},
        model="llama_mha",
    ),
)

SEEDS: dict[str, tuple[int, ...]] = {
    "default": (0, 1),
    "budget a multiple of the block": (0, 0, 5, 6),
    "large blocks": (0, 1, 3, 0),
    "segments": (0, 1, 1, 5),
    "long segments": (0, 0, 2, 5),
    "8 bits": (0, 0, 0, 3),
    "128 bits": (0, 3, 7, 2),
    "no sinks": (0, 0, 0, 1),
    "every query votes": (0, 1, 6, 8),
    "token by token": (0, 1),
    "paper": (0, 0, 0, 1),
    "reference": (0, 0, 0, 2),
    "instant": (0, 1, 3, 15),
    "instant, 128 bits": (0, 1, 5, 15),
    "instant, prompt held": (1, 0, 10, 3),
    "instant, no protection": (0, 1, 2, 16),
    "instant, token by token": (1, 0),
    "one query head": (0, 0, 1, 1),
    "one query head, segments": (1, 3, 0, 0),
    "one query head, reference": (0, 1, 1, 1),
}
"""Seeds of prompts whose continuation rounding noise leaves alone, per length; from
``python -m support.find_prompts``, which asks the oracle and not the engine."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_engine_equals_the_oracle(
    case: Case, request: pytest.FixtureRequest
) -> None:
    model: Path = request.getfixturevalue(case.model)
    oracle: Oracle = request.getfixturevalue(f"{case.model}_oracle")
    seeds = zip(case.lengths, SEEDS[case.name], strict=True)
    prompts = [random_prompt(length, seed) for length, seed in seeds]
    policy = resolve(case.policy, case.block_size)
    expected = [oracle.greedy(prompt, policy) for prompt in prompts]
    options = {"block_size": case.block_size, "max_num_seqs": len(prompts)}
    with engine(model, case.policy, **options) as llm:
        assert greedy(llm, prompts) == expected
