"""``prefill-layer``: one layer reads a prompt, segment by segment, against stock.

One request at a time. Stock attends to the whole prompt before; a budgeted layer to the
live slots and the open segment, and then cuts the segment back. Both in the scheduler's
chunks.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from hashevict_vllm.bench import timing
from hashevict_vllm.bench.layer import Attention, BudgetedLayer, PagedCache, Shape
from hashevict_vllm.bench.results import Results, show_progress
from hashevict_vllm.bench.rules import RULES, rule_named
from hashevict_vllm.config import SEGMENT_PROMPT, KVPolicyConfig
from hashevict_vllm.resolved import ResolvedKVPolicy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    add = parser.add_argument
    add("--rules", nargs="+", default=["vote", "instant"], choices=list(RULES))
    add("--lengths", nargs="+", type=int, default=[2048, 4096, 16384, 65536])
    add("--segments", nargs="+", default=["256", "1024", "4096", SEGMENT_PROMPT])
    add("--budget", type=int, default=1024)
    add("--chunk", type=int, default=2048, help="tokens that a scheduler step reads")
    add("--head-dim", nargs="+", type=int, default=[64, 128])
    add("--heads", default="32/8", metavar="QUERY/KV")
    add("--repeats", type=int, default=3)


def run(options: argparse.Namespace, results: Results) -> None:
    """Measure the grid; a length's stock layer takes turns with all our rules."""
    query_heads, kv_heads = map(int, options.heads.split("/"))
    cells = [(head_dim, n) for head_dim in options.head_dim for n in options.lengths]
    for head_dim, length in show_progress(cells, "prefill-layer"):
        shape = Shape(query_heads, kv_heads, head_dim)
        ours = {
            f"{rule} segment={segment}": _resolve(rule, segment, length, shape, options)
            for rule in options.rules
            for segment in options.segments
        }
        row = {
            "length": length,
            "head_dim": head_dim,
            "budget": options.budget,
            **measure(ours, shape, length, options.chunk, options.repeats),
        }
        results.add(row)
        for name in ours:
            results.say(
                f"{length} tokens, D={head_dim}, {name}: "
                f"{row['seconds'][name]['median']:.2f} s, "
                f"{timing.show(row['speedup'][name])} x faster than stock; "
                f"of attention alone "
                f"{timing.show(row['attention_speedup'][name])} x"
            )


def plot(results: Results) -> None:
    """Seconds against the length of the prompt."""
    for head_dim in sorted({row["head_dim"] for row in results.rows}):
        lines: dict[str, list[tuple[float, dict[str, float]]]] = {}
        for row in results.rows:
            if row["head_dim"] == head_dim:
                for name, spread in row["seconds"].items():
                    lines.setdefault(name, []).append((row["length"], spread))
        results.plot(
            f"prefill-layer-D{head_dim}",
            lines,
            xlabel="prompt (tokens)",
            ylabel="seconds of one layer",
            log=True,
        )


def _resolve(
    rule: str, segment: str, length: int, shape: Shape, options: argparse.Namespace
) -> ResolvedKVPolicy:
    wanted = rule_named(rule) | {"budget": options.budget, "segment": segment}
    longest = max(length, options.budget)
    return KVPolicyConfig.from_dict(wanted).resolve(longest, shape.block_size)


def measure(
    ours: dict[str, ResolvedKVPolicy],
    shape: Shape,
    length: int,
    chunk: int,
    repeats: int,
) -> dict[str, Any]:
    """Time a prompt of ``length`` tokens through the stock layer and each of ours.

    Returns:
        ``seconds`` by name, and by name of ours ``speedup`` of the whole layer and
        ``attention_speedup`` of attention alone over stock, each with its spread.

    """
    q, k, v = shape.tokens(chunk)
    output = torch.empty_like(q)
    stock = _Stock(shape, length, chunk)
    layers = {
        name: _Ours(policy, shape, length, chunk) for name, policy in ours.items()
    }
    parts: dict[str, timing.Part] = {"stock": lambda _: stock.read(q, k, v, output)}
    for name, layer in layers.items():
        parts[name] = lambda _, layer=layer: layer.read(q, k, v, output)  # type: ignore[misc]
    seconds = timing.interleaved(parts, repeats)
    attention = {name: layer.attention_seconds[1:] for name, layer in layers.items()}
    return {
        "seconds": {n: timing.Spread.of(x).as_dict() for n, x in seconds.items()},
        "speedup": {
            n: timing.ratio(seconds["stock"], seconds[n]).as_dict() for n in ours
        },
        "attention_speedup": {
            n: timing.ratio(stock.attention_seconds[1:], attention[n]).as_dict()
            for n in ours
        },
    }


class _Reader:
    """Counts the time within attention of every prompt read, warm-up included."""

    def __init__(self) -> None:
        self.attention_seconds: list[float] = []

    def attend(self, call: Attention, q: torch.Tensor, output: torch.Tensor) -> None:
        part = {"attention": lambda _: call(q, output)}
        seconds = timing.interleaved(part, repeats=1, warm_up=0)["attention"][0]
        self.attention_seconds[-1] += seconds


class _Stock(_Reader):
    """Stock layer: writes a chunk, attends to all before it."""

    def __init__(self, shape: Shape, length: int, chunk: int) -> None:
        super().__init__()
        self.cache = PagedCache(shape, 1, length)
        self.steps = []
        for start in range(0, length, chunk):
            count = min(chunk, length - start)
            slots = self.cache.flat_slots(0, start, count)
            call = Attention(self.cache, [0], [count], [start + count])
            self.steps.append((slots, call))

    def read(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor
    ) -> None:
        self.attention_seconds.append(0.0)
        for slots, call in self.steps:
            n = len(slots)
            self.cache.write(k[:n], v[:n], slots)
            self.attend(call, q[:n], output[:n])


class _Ours(_Reader):
    """Budgeted layer: round by round, as `hashevict_vllm.attention.cpu.forward`."""

    def __init__(
        self, policy: ResolvedKVPolicy, shape: Shape, length: int, chunk: int
    ) -> None:
        super().__init__()
        held = length if policy.segment == 1 else policy.budget + policy.segment
        self.layer = BudgetedLayer(policy, shape, 1, min(held, length))
        self.steps = [
            step
            for start in range(0, length, chunk)
            for step in self.layer.plan([start], [min(chunk, length - start)], length)
        ]

    def read(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor
    ) -> None:
        self.attention_seconds.append(0.0)
        for step in self.steps:
            self.layer.write(step, q, k, v)
            self.attend(step.attention, q[step.rows], output[step.rows])
            self.layer.reduce(step, q, k, v)
