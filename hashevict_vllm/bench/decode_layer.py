"""``decode-layer``: a decode step of one layer, against stock attention.

The eviction step (hash, scan, write) is set against the stock layer (vLLM's cache
update and attention) over as many live slots: what a budget costs. Stock writes a token
too, so three figures are given, each in terms of the stock layer: the *share* of the
whole eviction step, its *extra* over stock's cache update, and the *slowdown* of the
layer, eviction step and the attention that follows it. With ``--length``, the whole
budgeted layer is set against the stock layer over a request of that length: what a
budget saves.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from hashevict_vllm.bench import timing
from hashevict_vllm.bench.layer import Attention, BudgetedLayer, PagedCache, Shape
from hashevict_vllm.bench.results import Results, show_progress
from hashevict_vllm.bench.rules import RULES, rule_named
from hashevict_vllm.config import KVPolicyConfig
from hashevict_vllm.resolved import ResolvedKVPolicy

STEPS = 8
"""Positions of a sample; a multiple of ``vote_every``, as only some tokens vote."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    add = parser.add_argument
    add("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    add("--budgets", nargs="+", type=int, default=[256, 1024, 4096, 16384])
    add("--batch", nargs="+", type=int, default=[1, 8, 64])
    add("--head-dim", nargs="+", type=int, default=[64, 128])
    add("--bits", nargs="+", type=int, default=[16, 64, 128])
    add("--length", nargs="+", type=int, default=[], help="stock request lengths")
    add("--heads", default="32/8", metavar="QUERY/KV")
    add("--repeats", type=int, default=15)
    add("--max-gib", type=float, default=3.0, help="skip larger KV caches")


def run(options: argparse.Namespace, results: Results) -> None:
    """Measure the grid."""
    bandwidth = timing.read_bandwidth()
    results.note("read_bandwidth", bandwidth.as_dict())
    query_heads, kv_heads = map(int, options.heads.split("/"))
    cells = [
        (Shape(query_heads, kv_heads, head_dim), rule, bits, budget, batch)
        for head_dim in options.head_dim
        for rule in options.rules
        for bits in (options.bits if RULES[rule].hashes else [0])
        for budget in options.budgets
        for batch in options.batch
    ]
    for shape, rule, bits, budget, batch in show_progress(cells, "decode-layer"):
        longest = max([budget, *options.length])
        if batch * longest * shape.kv_bytes_per_token > options.max_gib * 2**30:
            continue
        policy = resolve(rule, bits, budget, shape)
        row = {
            "rule": rule,
            "bits": bits,
            "budget": budget,
            "batch": batch,
            "head_dim": shape.head_dim,
            **measure(policy, shape, batch, options.repeats, options.length),
        }
        moved = bytes_read(policy, shape, batch)
        row["bytes_read"] = moved
        row["floor_s"] = moved / bandwidth.median
        results.add(row)
        evict = row["seconds"]["evict and vote"]["median"]
        results.say(
            f"{rule} b={bits} C={budget} batch={batch} D={shape.head_dim}: "
            f"evict {1e6 * evict:.0f} us = "
            f"{timing.show(row['evict_share'], 100)} % of the stock layer, "
            f"{timing.show(row['extra'], 100)} % more than its cache update; "
            f"layer {timing.show(row['slowdown'], 100)} %; "
            f"{evict / row['floor_s']:.1f} x the time to read its bytes"
            + "".join(
                f"; {length} tokens: {timing.show(speedup)} x faster"
                for length, speedup in row["speedup"].items()
            )
        )


def plot(results: Results) -> None:
    """Share of the stock layer against the budget, one line per rule."""
    rows = results.rows
    for head_dim in sorted({row["head_dim"] for row in rows}):
        for batch in sorted({row["batch"] for row in rows}):
            here = [r for r in rows if (r["head_dim"], r["batch"]) == (head_dim, batch)]
            lines: dict[str, list[tuple[float, dict[str, float]]]] = {}
            for row in here:
                name = row["rule"] + (f" {row['bits']} bits" if row["bits"] else "")
                lines.setdefault(name, []).append((row["budget"], row["evict_share"]))
            results.plot(
                f"decode-layer-D{head_dim}-batch{batch}",
                lines,
                xlabel="budget (live slots)",
                ylabel="eviction step / stock attention layer",
                log=True,
            )


def resolve(rule: str, bits: int, budget: int, shape: Shape) -> ResolvedKVPolicy:
    """A rule's policy with this budget."""
    options = rule_named(rule, bits) | {"budget": budget}
    return KVPolicyConfig.from_dict(options).resolve(budget * 64, shape.block_size)


def measure(
    policy: ResolvedKVPolicy,
    shape: Shape,
    batch: int,
    repeats: int,
    lengths: list[int],
) -> dict[str, Any]:
    """Time one cell of the grid; every request is at budget and decodes one token.

    Returns:
        ``seconds`` of every part; the stock layer at equal slots is the unit of
        ``evict_share`` (eviction before attention and ballot after it), of ``extra``
        (the same less stock's cache update) and of ``slowdown`` (with attention);
        ``speedup`` over the stock layer by length. Each with its spread.

    """
    budget = policy.budget
    layer = BudgetedLayer(policy, shape, batch, budget)
    first = 4 * budget // STEPS * STEPS
    layer.fill_metadata(first)
    ones = [1] * batch
    # As many plans as any run needs: a position is decoded once.
    plans = [
        layer.plan([first + i] * batch, ones, prompt_len=1)[0]
        for i in range((repeats + 1) * STEPS)
    ]
    tokens = [shape.tokens(batch) for _ in range(STEPS)]
    output = torch.empty_like(tokens[0][0])
    caches = {budget: layer.cache}
    caches |= {n: PagedCache(shape, batch, n) for n in lengths if n != budget}
    everyone = list(range(batch))
    upcoming = iter(plans)

    plan = plans[0]

    def evict(step: int) -> None:
        nonlocal plan
        plan = next(upcoming)
        layer.write(plan, *tokens[step])

    def vote(step: int) -> None:
        layer.reduce(plan, *tokens[step])

    parts: dict[str, timing.Part] = {}
    for n, cache in caches.items():
        attention = Attention(cache, everyone, ones, [n] * batch)
        slots = torch.cat([cache.flat_slots(i, n - 1, 1) for i in everyone])

        def update(step: int, cache: PagedCache = cache, at: Any = slots) -> None:
            cache.write(*tokens[step][1:], at)

        def attend(step: int, attention: Attention = attention) -> None:
            attention(tokens[step][0], output)

        parts |= {f"update {n}": update, f"attend {n}": attend}
        if n == budget:
            # After stock's attention, so that the scan reads memory that the caches
            # have given up, as it does in a model of many layers; attention once more,
            # as it may find what the eviction step has brought.
            parts |= {"evict": evict, "attend evicted": attend, "vote": vote}
    seconds = timing.interleaved(parts, repeats, STEPS)
    seconds["evict and vote"] = timing.total(seconds["evict"], seconds["vote"])
    stock = {
        n: timing.total(seconds[f"update {n}"], seconds[f"attend {n}"]) for n in caches
    }
    ours = timing.total(seconds["evict and vote"], seconds["attend evicted"])
    # Against other lengths: the attention that comes after theirs; the one that comes
    # after its like finds a small cache's keys near.
    cold = timing.total(seconds["evict and vote"], seconds[f"attend {budget}"])
    more = [
        after - before
        for after, before in zip(
            seconds["evict and vote"], seconds[f"update {budget}"], strict=True
        )
    ]
    return {
        "seconds": {
            name: timing.Spread.of(sample).as_dict() for name, sample in seconds.items()
        },
        "evict_share": timing.ratio(seconds["evict and vote"], stock[budget]).as_dict(),
        "extra": timing.ratio(more, stock[budget]).as_dict(),
        "slowdown": timing.ratio(ours, stock[budget]).as_dict(),
        "speedup": {n: timing.ratio(stock[n], cold).as_dict() for n in lengths},
    }


def bytes_read(policy: ResolvedKVPolicy, shape: Shape, batch: int) -> float:
    """Bytes per step that a rule cannot do without reading from the cache.

    A scan reads a word of every slot, or the signature, and its position; a ballot, in
    one step of ``vote_every``, signatures, norms, positions and votes.
    """
    from hashevict_vllm.kernels.projection import num_words

    signature = num_words(policy.hash_bits)
    words = {
        "vote": 2 + (signature + 3) / policy.vote_every,
        "instant": signature + 1,
        "recency": 1,
        "random": 1,
        "norm": 2,
    }
    if policy.scoring == "cosine":
        per_slot: float = 4 + shape.head_dim * shape.dtype.itemsize
    else:
        per_slot = 4 * words[policy.scoring]
    return batch * shape.kv_heads * policy.budget * per_slot
