"""``serve``: a real ``vllm serve`` under ``vllm bench serve``, against stock.

Servers take turns, one at a time, as two on the same cores wait for each other's
spinning threads. With ``--cpus`` stock and ours run at once, each on processors of its
own, which the next round swaps: what slows the machine for a while slows both.
Scenarios: ample (budget of at least the length), tight and deep (pools that stock
overflows), prompts (long ones, short answers), long (inter-token latency as one answer
grows), chat (turns that repeat what was said). ``stock`` runs without this plugin,
``off`` with it and without a policy, ``uncached`` with the default policy and without
prefix caching.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

from hashevict_vllm.bench import chat, server, timing
from hashevict_vllm.bench.results import Results, show_progress
from hashevict_vllm.bench.scenarios import (
    BLOCK_SIZE,
    SCENARIOS,
    Scenario,
    kv_bytes_per_token,
    model_directory,
)

METRICS = {
    "throughput": "output_throughput",
    "ttft_ms": "median_ttft_ms",
    "itl_p50_ms": "median_itl_ms",
    "itl_p95_ms": "p95_itl_ms",
    "itl_p99_ms": "p99_itl_ms",
}
"""Ours: the client's."""

CHAT_METRICS = (*METRICS, "later_ttft_ms")
"""Of chats: ``ttft_ms`` is that of first turns."""

WINDOW = 128
"""Tokens over which the latency at a length is averaged, to either side."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    add = parser.add_argument
    add("--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
    add(
        "--policies",
        nargs="+",
        default=["hashevict"],
        help="compared with stock: names of --kv-policy, off, or uncached",
    )
    add("--rounds", type=int, default=3, help="starts of every server")
    add(
        "--cpus",
        nargs=2,
        metavar=("FIRST", "SECOND"),
        help="run stock and ours at once on these processors, such as 0-1 2-3",
    )
    add("--model", help="directory of another model, for all scenarios")
    add("--budget", type=int, help="another budget")
    add("--output-tokens", type=int, help="other answers, for a quick run")
    add("--requests", type=int, help="another number of requests, likewise")
    add("--eager", action="store_true", help="servers with --enforce-eager")
    add(
        "--policy-config", default="", metavar="JSON", help="--kv-policy-config of ours"
    )


def run(options: argparse.Namespace, results: Results) -> None:
    """Run the scenarios, servers in turn; every run is a row, then the ratios."""
    for cpus in options.cpus or ():
        numbers_of(cpus)  # before the first server
    for name in options.scenarios:
        scenario = SCENARIOS[name]
        if options.budget:
            scenario = replace(scenario, budget=options.budget)
        if options.output_tokens:
            scenario = replace(scenario, output=options.output_tokens)
        if options.requests:
            scenario = replace(scenario, requests=options.requests)
        scenario = replace(scenario, model=options.model or scenario.model)
        kv_bytes_per_token(model_directory(scenario.model))  # before there are threads
        pairs: dict[str, list[Pair]] = {policy: [] for policy in options.policies}
        for turn in show_progress(range(options.rounds), f"serve {name}"):
            for policy, pair in take_turn(turn, scenario, options, results, name):
                pairs[policy].append(pair)
        compared = {f"{policy} / stock": pairs[policy] for policy in options.policies}
        if {"hashevict", "uncached"} <= pairs.keys():
            compared["hashevict / uncached"] = [
                (uncached, ours)
                for (_, uncached), (_, ours) in zip(
                    pairs["uncached"], pairs["hashevict"], strict=True
                )
            ]
        for label, rows in compared.items():
            report(results, f"{name}, {label}", compare(rows))


def report(results: Results, label: str, compared: dict[str, dict[str, float]]) -> None:
    """Keep and print ratios."""
    results.note(label, compared)
    shown = (f"{metric} {timing.show(spread)}" for metric, spread in compared.items())
    results.say(f"{label}: {', '.join(shown)}")


Pair = tuple[dict[str, Any], dict[str, Any]]
"""Rows of stock and of ours, of the same round."""


def take_turn(
    turn: int,
    scenario: Scenario,
    options: argparse.Namespace,
    results: Results,
    name: str,
) -> list[tuple[str, Pair]]:
    """One round: stock and every policy, in turns or side by side."""

    def run_server(
        policy: str,
        cpus: str = "",
        beside: str = "",
        ready: Callable[[], Any] = lambda: None,
    ) -> dict[str, Any]:
        label = f"{name}-{policy}{beside and f'-beside-{beside}'}-{turn}"
        row = measure(scenario, policy, options, results, label, cpus, ready)
        results.add(
            {"scenario": name, "policy": policy, "round": turn, "cpus": cpus, **row}
        )
        results.say(
            f"{name}, {policy}: {row['throughput']:.1f} tokens/s, ITL p50 "
            f"{row['itl_p50_ms']:.1f} p95 {row['itl_p95_ms']:.1f} ms, TTFT "
            f"{row['ttft_ms']:.0f} ms, {row['preemptions']:.0f} preemptions, "
            f"at most {row['peak_num_requests_running']:.0f} requests at once "
            f"and {row['peak_blocks']} of {row['pool_blocks']} blocks"
        )
        return row

    if not options.cpus:
        stock = run_server("stock")
        return [(policy, (stock, run_server(policy))) for policy in options.policies]
    ours_on, stock_on = options.cpus if turn % 2 else reversed(options.cpus)
    found = []
    with ThreadPoolExecutor(2) as both:
        for policy in options.policies:
            ready = Barrier(2, timeout=server.START_TIMEOUT_S).wait
            stock_run = both.submit(run_server, "stock", stock_on, policy, ready)
            run = both.submit(run_server, policy, ours_on, "stock", ready)
            found.append((policy, (stock_run.result(), run.result())))
    return found


def plot(results: Results) -> None:
    """Latency against tokens generated, one line per server."""
    for name in sorted({row["scenario"] for row in results.rows}):
        here = [row for row in results.rows if row["scenario"] == name]
        lines: dict[str, list[tuple[float, dict[str, float]]]] = {}
        for policy in dict.fromkeys(row["policy"] for row in here):
            runs = [row["itl_by_length"] for row in here if row["policy"] == policy]
            lines[policy] = [
                (int(at), timing.Spread.of([run[at] for run in runs]).as_dict())
                for at in runs[0]
                if all(at in run for run in runs)
            ]
        results.plot(
            f"serve-{name}",
            lines,
            xlabel="tokens generated",
            ylabel="inter-token latency (ms)",
        )


def measure(
    scenario: Scenario,
    policy: str,
    options: argparse.Namespace,
    results: Results,
    label: str,
    cpus: str,
    ready: Callable[[], Any],
) -> dict[str, Any]:
    """One server's start, one load; with ``cpus``, such as 0-1, on these processors.

    ``ready`` is called before the load; it may wait for another server.

    Returns:
        The client's figures (`METRICS`), the server's (preemptions, peaks) and
        ``itl_by_length``: mean latency in ms around a number of generated tokens.

    """
    model = model_directory(scenario.model)
    # One block is vLLM's null block.
    pool = (scenario.pool_tokens + BLOCK_SIZE) * kv_bytes_per_token(model)
    flags = ["--dtype", "bfloat16", "--max-model-len", str(scenario.max_model_len)]
    flags += ["--block-size", str(BLOCK_SIZE)]
    flags += ["--max-num-seqs", str(scenario.in_flight)]
    flags += ["--kv-cache-memory-bytes", str(pool)]
    flags += ["--enable-prompt-tokens-details"] if scenario.turns else []
    flags += ["--enforce-eager"] if options.eager else []
    if policy == "uncached":
        flags += ["--no-enable-prefix-caching"]
    if policy not in ("stock", "off"):
        name = "hashevict" if policy == "uncached" else policy
        flags += ["--kv-policy", name, "--kv-budget", str(scenario.budget)]
        if options.policy_config:
            flags += ["--kv-policy-config", options.policy_config]
    # An empty list of names: vLLM loads no plugin at all.
    variables = {"VLLM_PLUGINS": ""} if policy == "stock" else {}
    if cpus:
        # Of this thread, and inherited by the processes that it starts.
        os.sched_setaffinity(0, numbers_of(cpus))
        variables["VLLM_CPU_OMP_THREADS_BIND"] = cpus
        variables["OMP_NUM_THREADS"] = str(len(numbers_of(cpus)))
    log = results.directory / f"{label}.log"
    with server.serve(model, flags, log, variables) as running:
        blocks = running.pool_blocks()
        if (blocks - 1) * BLOCK_SIZE > scenario.pool_tokens:
            raise RuntimeError(
                f"a pool of {blocks} blocks is not the scenario's; see {log}"
            )
        # The first requests compile, page in and allocate.
        server.run_client(
            running, model, 32, 16, 2, 2, results.directory / f"{label}-warm.json"
        )
        ready()
        with running.watched() as watched:
            if scenario.turns:
                found = chat.run_client(
                    running,
                    model,
                    scenario.turns,
                    scenario.output,
                    scenario.requests,
                    scenario.in_flight,
                    seed=0,
                )
                figures = {name: found[name] for name in CHAT_METRICS}
                figures["cached_tokens"] = found["cached_tokens"]
            else:
                found = server.run_client(
                    running,
                    model,
                    scenario.prompt,
                    scenario.output,
                    scenario.requests,
                    scenario.in_flight,
                    results.directory / f"{label}.client.json",
                )
                figures = {ours: found[theirs] for ours, theirs in METRICS.items()}
    return {
        **figures,
        **watched,
        "pool_blocks": blocks,
        "peak_blocks": round(watched["peak_kv_cache_usage_perc"] * (blocks - 1)),
        "itl_by_length": itl_by_length(found["itls"]),
    }


def numbers_of(cpus: str) -> set[int]:
    """Processors of a list such as 0-1,4.

    Raises:
        ValueError: If it is none.

    """
    found: set[int] = set()
    for part in cpus.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def itl_by_length(itls: list[list[float]]) -> dict[int, float]:
    """Mean latency in ms around 256, 512, 1024, .. generated tokens.

    Args:
        itls: Seconds between tokens, for every request.

    """
    longest = max((len(request) for request in itls), default=0)
    found, at = {}, 256
    while at + WINDOW <= longest:
        near = [x for request in itls for x in request[at - WINDOW : at + WINDOW]]
        found[at] = 1e3 * statistics.fmean(near)
        at *= 2
    if longest > 4 * WINDOW:
        last = [x for request in itls for x in request[longest - 2 * WINDOW :]]
        found[longest - WINDOW] = 1e3 * statistics.fmean(last)
    return found


def compare(pairs: list[Pair]) -> dict[str, dict[str, float]]:
    """Ratios ours / stock of a client's metrics, of runs in the same round."""
    return {
        metric: timing.ratio(
            [ours[metric] for _, ours in pairs], [stock[metric] for stock, _ in pairs]
        ).as_dict()
        for metric in CHAT_METRICS
        if metric in pairs[0][0]
    }
