"""A resumed request reads its output again, in steps that others can bear."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from support.engine import engine, runner_of, scheduler_of
from support.models import random_prompt
from test_memory import add

from hashevict_vllm.plan import MAX_ROUNDS

POLICY = {"budget": 96, "segment": 32, "sinks": 4, "recent": 8}
PROMPT = 40
GENERATED = 96 + 4 * MAX_ROUNDS


def rounds_of_steps(llm: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Attention calls of every step from now on."""
    ((group,),) = runner_of(llm).attn_groups
    (builder,) = group.metadata_builders
    rounds, stock = [], builder.build

    def build(*args: Any, **kwargs: Any) -> Any:
        metadata = stock(*args, **kwargs)
        rounds.append(len(metadata.rounds))
        return metadata

    monkeypatch.setattr(builder, "build", build)
    return rounds


def preempt(scheduler: Any, request: Any) -> None:
    """As the scheduler does when blocks run out."""
    scheduler.running.remove(request)
    scheduler._preempt_request(request, time.monotonic())
    scheduler.prev_step_scheduled_req_ids.discard(request.request_id)


def generate(
    llm: Any, preempt_after: int | None, tokens: int
) -> tuple[list[int], list[int]]:
    """A request's tokens, and what its neighbour had got while it resumed.

    The neighbour's are counted at each step from the preemption to the next token.
    """
    scheduler = scheduler_of(llm)
    add(llm, "long", random_prompt(PROMPT), tokens)
    request = scheduler.requests[next(iter(scheduler.requests))]
    add(llm, "neighbour", random_prompt(30, 5), 3 * tokens)
    neighbour = scheduler.requests[list(scheduler.requests)[-1]]
    got: list[int] = []
    while not request.is_finished():
        llm.llm_engine.step()
        if request.num_output_tokens == preempt_after and not got:
            preempt(scheduler, request)
            while request.num_output_tokens == preempt_after:
                got.append(neighbour.num_output_tokens)
                llm.llm_engine.step()
    llm.llm_engine.abort_request([neighbour.request_id], internal=True)
    return list(request.output_token_ids), got


def test_a_neighbour_gets_a_token_every_few_rounds_while_a_request_resumes(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(llama, POLICY, max_num_seqs=2) as llm:
        alone, _ = generate(llm, None, GENERATED + 8)
        rounds = rounds_of_steps(llm, monkeypatch)
        resumed, got = generate(llm, GENERATED, GENERATED + 8)
    assert resumed == alone
    assert max(rounds) == MAX_ROUNDS
    # The prompt and what fits behind it are two rounds, every further token is one.
    assert len(got) == -(-(2 + PROMPT + GENERATED - 96) // MAX_ROUNDS)
    assert got == list(range(got[0], got[0] + len(got)))
