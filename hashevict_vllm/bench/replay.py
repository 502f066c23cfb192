"""``replay``: what others wait for while a preempted request is read again.

A request has generated an answer far beyond its budget; a neighbour decodes beside it.
The first is preempted by the scheduler's own means, and resumes: every token that had
evicted takes an attention call of its own. Timed are the steps until it decodes again,
in each of which the neighbour gets one token; ``--rounds`` are values of
`hashevict_vllm.plan.MAX_ROUNDS` that are compared, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from hashevict_vllm import plan
from hashevict_vllm.bench.results import Results
from hashevict_vllm.bench.scenarios import BLOCK_SIZE, model_directory, own_pool
from hashevict_vllm.config import kv_policy

UNLIMITED = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    add = parser.add_argument
    add("--policy", default="hashevict")
    add("--budget", type=int, default=512)
    add("--prompt", type=int, default=256)
    add("--generated", type=int, default=2048, help="tokens of the preempted answer")
    add("--rounds", nargs="+", type=int, default=[UNLIMITED, 128, 32, 8])
    add("--model", default="default", help="default, random or a directory")


def run(options: argparse.Namespace, results: Results) -> None:
    """Preempt and resume the same request once for every limit."""
    engine = make_engine(options)
    scheduler = engine.engine_core.engine_core.scheduler
    params = {"temperature": 0, "ignore_eos": True, "detokenize": False}
    add_request(engine, "long", options.prompt, 2 * options.generated, params)
    (request,) = scheduler.requests.values()
    while request.num_output_tokens < options.generated:
        engine.step()
    add_request(engine, "neighbour", options.prompt, 2 * options.generated, params)
    for _ in range(8):
        engine.step()
    own = plan.MAX_ROUNDS
    for limit in options.rounds:
        plan.MAX_ROUNDS = limit
        seconds = replay(engine, scheduler, request)
        row = {
            "rounds": limit,
            "steps": len(seconds),
            "longest": max(seconds),
            "median": statistics.median(seconds),
            "total": sum(seconds),
        }
        results.add(row)
        shown = ", ".join(f"{name} {row[name]:.4f} s" for name in list(row)[2:])
        results.say(f"at most {limit} rounds: {len(seconds)} steps, {shown}")
    plan.MAX_ROUNDS = own


def make_engine(options: argparse.Namespace) -> Any:
    """An engine with room for both requests."""
    from vllm import LLM

    model = model_directory(options.model)
    longest = options.prompt + 3 * options.generated
    return LLM(
        str(model),
        dtype="bfloat16",
        enforce_eager=True,
        block_size=BLOCK_SIZE,
        max_model_len=longest,
        max_num_seqs=2,
        kv_cache_memory_bytes=own_pool(model, 4 * longest),
        additional_config=kv_policy(options.policy, budget=options.budget),
    ).llm_engine


def add_request(
    engine: Any, name: str, prompt: int, tokens: int, params: dict[str, Any]
) -> None:
    """A prompt of plain numbers."""
    from vllm import SamplingParams

    ids = [1000 + 7 * i % 5000 for i in range(prompt)]
    sampling = SamplingParams(max_tokens=tokens, **params)
    engine.add_request(name, {"prompt_token_ids": ids}, sampling)


def replay(engine: Any, scheduler: Any, request: Any) -> list[float]:
    """Seconds of every step from the preemption to the request's next token."""
    scheduler.running.remove(request)
    scheduler._preempt_request(request, time.monotonic())
    scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
    generated, seconds = request.num_output_tokens, []
    while request.num_output_tokens == generated:
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    return seconds
