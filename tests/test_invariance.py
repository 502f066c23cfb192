"""Results do not depend on chunking, neighbours, pool size, ranks or compilation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support.engine import engine, greedy, scheduler_of
from support.models import random_prompt
from support.oracle import Oracle, resolve
from test_over_budget import CASES, SEEDS

NAMED = {case.name: case for case in CASES}
NAMES = ("default", "segments", "instant")


@dataclass(frozen=True)
class Expected:
    """What the oracle says of a policy; its budget is 201 tokens."""

    policy: dict[str, Any]
    prompts: list[list[int]]
    tokens: list[list[int]]


@pytest.fixture(scope="module", params=NAMES)
def expected(request: pytest.FixtureRequest, llama_oracle: Oracle) -> Expected:
    case, seeds = NAMED[request.param], SEEDS[request.param]
    prompts = [random_prompt(n, s) for n, s in zip(case.lengths, seeds, strict=True)]
    policy = case.policy
    resolved = resolve(policy)
    tokens = [llama_oracle.greedy(prompt, resolved) for prompt in prompts]
    return Expected(policy, prompts, tokens)


@pytest.mark.parametrize("max_num_batched_tokens", [64, 100, 256, 512, 2048])
def test_outputs_do_not_depend_on_how_the_prompt_is_chunked(
    max_num_batched_tokens: int, llama: Path, expected: Expected
) -> None:
    options = {"max_num_batched_tokens": max_num_batched_tokens, "max_num_seqs": 2}
    with engine(llama, expected.policy, **options) as llm:
        assert greedy(llm, expected.prompts) == expected.tokens


@pytest.mark.parametrize("max_num_batched_tokens", [256, 2048])
def test_outputs_do_not_depend_on_eight_neighbours(
    max_num_batched_tokens: int, llama: Path, expected: Expected
) -> None:
    neighbours = [random_prompt(n, 7) for n in (400, 30, 250, 90, 600)]
    mixed = [*neighbours[:2], *expected.prompts, *neighbours[2:]]
    options = {"max_num_seqs": 9, "max_num_batched_tokens": max_num_batched_tokens}
    with engine(llama, expected.policy, **options) as llm:
        assert greedy(llm, mixed)[2 : -len(neighbours) + 2] == expected.tokens


def test_preempted_requests_replay_to_the_same_tokens(
    llama: Path, expected: Expected
) -> None:
    # 201 tokens are 7 blocks and 8 requests 56, more than the pool holds: they must
    # preempt each other, in prompt and in output. The longest held prompt is 22 blocks.
    blocks = 20 if expected.policy.get("segment") else 34
    options = {"max_num_seqs": 8, "num_gpu_blocks_override": blocks}
    with engine(llama, expected.policy, max_model_len=1024, **options) as llm:
        preempted = count_preemptions(llm)
        copies = 8 // len(expected.prompts)
        eight = [prompt for prompt in expected.prompts for _ in range(copies)]
        assert greedy(llm, eight)[::copies] == expected.tokens
    assert sum(preempted.values()) > 0
    assert max(preempted.values()) < 50


def count_preemptions(llm: Any) -> dict[str, int]:
    """Count per request from now on."""
    scheduler, counts = scheduler_of(llm), {}
    stock = scheduler._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> None:
        counts[request.request_id] = counts.get(request.request_id, 0) + 1
        stock(request, *args, **kwargs)

    scheduler._preempt_request = preempt
    return counts


def generate_in_subprocess(
    model: Path, env: dict[str, str], case: Expected, tokens: int, **options: Any
) -> list[list[int]]:
    """Greedy tokens from a fresh process; its threads are not bound to one core."""
    job = {
        "model": str(model),
        "policy": case.policy,
        "prompts": case.prompts,
        "tokens": tokens,
        "options": options,
    }
    inherited = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    inherited.pop("VLLM_CPU_OMP_THREADS_BIND")
    done = subprocess.run(
        [sys.executable, "-m", "support.generate"],
        input=json.dumps(job),
        env={**inherited, **env},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.serial
@pytest.mark.parametrize("expected", NAMES[:1], indirect=True)
def test_two_tensor_parallel_ranks_give_the_same_tokens(
    llama: Path, expected: Expected
) -> None:
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    # Twice, so that the second time pages are copied on both ranks.
    twice = replace(expected, prompts=expected.prompts * 2)
    options = {"tensor_parallel_size": 2, "enable_prefix_caching": True}
    tokens = generate_in_subprocess(llama, env, twice, 100, **options)
    assert tokens == [output[:100] for output in expected.tokens * 2]


@pytest.mark.serial
@pytest.mark.parametrize("expected", NAMES[:1], indirect=True)
def test_a_compiled_model_gives_the_same_tokens(
    llama: Path, expected: Expected, tmp_path: Path
) -> None:
    env = {"VLLM_CACHE_ROOT": str(tmp_path)}
    tokens = generate_in_subprocess(llama, env, expected, 300, enforce_eager=False)
    assert tokens == expected.tokens
