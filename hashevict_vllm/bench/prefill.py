"""``prefill``: a whole engine reads long prompts, segment by segment, against stock.

Engines of a random Llama with few layers live in one process and take turns, so that
they share one pool of threads. Stock attends to all tokens before, and is measured up
to a length only: its time grows with the square.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import Any

import torch

from hashevict_vllm.bench import timing
from hashevict_vllm.bench.results import Results, show_progress
from hashevict_vllm.bench.rules import RULES, rule_named
from hashevict_vllm.bench.scenarios import BLOCK_SIZE, model_directory, own_pool
from hashevict_vllm.config import SEGMENT_PROMPT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    add = parser.add_argument
    add("--rule", default="vote", choices=list(RULES))
    add("--lengths", nargs="+", type=int, default=[2048, 4096, 16384, 65536])
    add("--segments", nargs="+", default=["256", "1024", "4096"])
    add("--budget", type=int, default=1024)
    add("--chunk", type=int, default=2048, help="tokens that a scheduler step reads")
    add("--layers", type=int, default=2)
    add("--stock-up-to", type=int, default=16384, help="longest prompt for stock")
    add("--model", default="random", help="random, default or a directory")
    add("--repeats", type=int, default=3)


def run(options: argparse.Namespace, results: Results) -> None:
    """Measure every length; then how time grows with it."""
    engines = make_engines(options)
    rows = []
    for length in show_progress(options.lengths, "prefill"):
        named = {
            name: engine
            for name, engine in engines.items()
            if name != "stock" or length <= options.stock_up_to
        }
        row = {"length": length, **measure(named, length, options.repeats)}
        rows.append(row)
        results.add(row)
        for name, seconds in row["seconds"].items():
            speedup = row["speedup"].get(name)
            results.say(
                f"{length} tokens, {name}: {timing.show(seconds)} s"
                + (f", {timing.show(speedup)} x faster than stock" if speedup else "")
            )
    for before, after in pairwise(rows):
        for name in after["seconds"].keys() & before["seconds"].keys():
            medians = [row["seconds"][name]["median"] for row in (after, before)]
            results.say(
                f"{name}: {after['length']} tokens take "
                f"{medians[0] / medians[1]:.2f} x as long as {before['length']}"
            )


def plot(results: Results) -> None:
    """Seconds against the length of the prompt."""
    lines: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for row in results.rows:
        for name, spread in row["seconds"].items():
            lines.setdefault(name, []).append((row["length"], spread))
    results.plot("prefill", lines, xlabel="prompt (tokens)", ylabel="seconds", log=True)


def make_engines(options: argparse.Namespace) -> dict[str, Any]:
    """Engines by name: stock, and one for each segment."""
    from vllm import LLM

    model = model_directory(options.model)
    longest = max(options.lengths) + BLOCK_SIZE

    def engine(tokens: int, policy: dict[str, Any] | None) -> LLM:
        # Room for padding and metadata, and vLLM's null block.
        pool = own_pool(model, 1.2 * (tokens + 2 * BLOCK_SIZE))
        return LLM(
            str(model),
            load_format="dummy",
            hf_overrides={"num_hidden_layers": options.layers},
            dtype="bfloat16",
            enforce_eager=True,
            enable_prefix_caching=False,
            block_size=BLOCK_SIZE,
            max_model_len=longest,
            max_num_seqs=1,
            max_num_batched_tokens=options.chunk,
            kv_cache_memory_bytes=int(pool),
            additional_config={"kv_policy": policy} if policy else {},
        )

    engines = {"stock": engine(longest, None)}
    for segment in options.segments:
        held = SEGMENT_PROMPT if segment == SEGMENT_PROMPT else int(segment)
        policy = rule_named(options.rule) | {"budget": options.budget, "segment": held}
        scratch = longest if held == SEGMENT_PROMPT else options.budget + int(held)
        engines[f"{options.rule} segment={segment}"] = engine(scratch, policy)
    return engines


def measure(engines: dict[str, Any], length: int, repeats: int) -> dict[str, Any]:
    """Time until the first token after a random prompt, engines in turn.

    Returns:
        ``seconds`` by engine, and ``speedup`` over stock where it ran, with spreads.

    """
    from vllm import SamplingParams

    one = SamplingParams(temperature=0, max_tokens=1)
    vocabulary = 10_000
    prompt = torch.randint(100, vocabulary, (length,)).tolist()

    def part(engine: Any) -> timing.Part:
        given: Any = {"prompt_token_ids": prompt}
        return lambda _: engine.generate(given, one, use_tqdm=False)

    seconds = timing.interleaved(
        {name: part(engine) for name, engine in engines.items()}, repeats
    )
    stock = seconds.get("stock")
    return {
        "seconds": {n: timing.Spread.of(x).as_dict() for n, x in seconds.items()},
        "speedup": {
            name: timing.ratio(stock, sample).as_dict()
            for name, sample in seconds.items()
            if stock and name != "stock"
        },
    }
