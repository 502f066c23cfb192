"""``steps``: decode steps of whole engines, step by step in turn, against stock.

What a policy costs a server as long as it evicts nothing is a few per cent of a step,
less than two servers on a shared machine differ by chance. Here engines live in one
process, on the same threads, and every step of one is followed by the same step of the
others, so that what slows the machine down slows all. ``stock again`` is a second stock
engine: how far it is from 1 is the noise.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

from hashevict_vllm.bench import timing
from hashevict_vllm.bench.results import Results
from hashevict_vllm.bench.scenarios import (
    BLOCK_SIZE,
    model_directory,
    own_pool,
    whole_blocks,
)
from hashevict_vllm.config import kv_policy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    add = parser.add_argument
    add("--policies", nargs="+", default=["hashevict", "streaming_llm"])
    add("--budget", type=int, default=1024)
    add("--prompt", type=int, default=256, help="tokens of every prompt")
    add("--output-tokens", type=int, default=192, help="of every answer")
    add("--requests", type=int, default=8)
    add("--model", default="default", help="default, random or a directory")


def run(options: argparse.Namespace, results: Results) -> None:
    """Step all engines through the same requests."""
    engines = {name: make_engine(None, options) for name in ("stock", "stock again")}
    for policy in options.policies:
        engines[policy] = make_engine(policy, options)
    for engine in engines.values():
        add_requests(engine, options)

    def part(engine: Any) -> timing.Part:
        return lambda _: engine.step()

    # The first steps read prompts.
    warm_up = options.output_tokens // 6
    seconds = timing.interleaved(
        {name: part(engine) for name, engine in engines.items()},
        repeats=options.output_tokens - warm_up - 1,
        warm_up=warm_up,
    )
    for name, engine in engines.items():
        if not engine.has_unfinished_requests():
            raise RuntimeError(f"{name} had no work left before the last step")
        ratio = timing.ratio(seconds[name], seconds["stock"]).as_dict()
        total = sum(seconds[name]) / sum(seconds["stock"])
        spread = timing.Spread.of(seconds[name]).as_dict()
        results.add({"engine": name, "seconds": spread, "ratio": ratio, "total": total})
        results.say(
            f"{name}: step {timing.show(spread, 1e3)} ms, {timing.show(ratio)} x "
            f"stock's step by step, {total:.3f} x in all"
        )


def make_engine(policy: str | None, options: argparse.Namespace) -> Any:
    """An engine with room for all requests; None is stock."""
    from vllm import LLM

    model = model_directory(options.model)
    longest = whole_blocks(options.prompt + options.output_tokens + 1)
    room = 1.2 * (options.requests + 1) * (longest + BLOCK_SIZE)
    return LLM(
        str(model),
        dtype="bfloat16",
        enforce_eager=True,
        enable_prefix_caching=False,
        block_size=BLOCK_SIZE,
        max_model_len=longest,
        max_num_seqs=options.requests,
        kv_cache_memory_bytes=own_pool(model, room),
        additional_config=kv_policy(policy, budget=options.budget) if policy else {},
    ).llm_engine


def add_requests(engine: Any, options: argparse.Namespace) -> None:
    """The same random prompts for every engine; no answer ends early."""
    from vllm import SamplingParams

    numbers = random.Random(0)
    sampling = SamplingParams(
        temperature=0, max_tokens=options.output_tokens, ignore_eos=True
    )
    for request in range(options.requests):
        tokens = [numbers.randrange(1000, 10_000) for _ in range(options.prompt)]
        engine.add_request(str(request), {"prompt_token_ids": tokens}, sampling)
