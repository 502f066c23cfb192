"""``evict-parts``: what the eviction step of one layer consists of, in cold caches.

Each part is run alone for all requests and heads, after attention over the same cache:
hashes, the scan with its scores, the write of K and V to arbitrary slots; for votes the
frame of the keys with what a new key is in it, and a ballot, which one step of
``vote_every`` takes. They need not add up to the
whole step, in which one part's memory accesses overlap with another's arithmetic.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from numba import njit

from hashevict_vllm.bench import timing
from hashevict_vllm.bench.decode_layer import resolve
from hashevict_vllm.bench.layer import Attention, BudgetedLayer, Shape
from hashevict_vllm.bench.results import Results, show_progress
from hashevict_vllm.kernels.cpu.evict import new_chosen, unowned_chosen
from hashevict_vllm.kernels.cpu.frame import adjacent_keys, describe_in, frame_of
from hashevict_vllm.kernels.cpu.hash import hash_row
from hashevict_vllm.kernels.cpu.layer import (
    hold,
    new_scratch,
    pages_of,
    rule_of,
    unowned_scratch,
)
from hashevict_vllm.kernels.cpu.scan import best_slot, reset_best
from hashevict_vllm.kernels.cpu.scores import merge_queries, scan_block
from hashevict_vllm.kernels.cpu.slots import copy_in
from hashevict_vllm.kernels.cpu.tokens import addresses, load_new_key, tokens_at
from hashevict_vllm.kernels.cpu.views import unowned
from hashevict_vllm.kernels.cpu.votes import cast_votes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    add = parser.add_argument
    add("--budgets", nargs="+", type=int, default=[1024, 4096])
    add("--batch", type=int, default=8)
    add("--head-dim", type=int, default=128)
    add("--bits", type=int, default=64)
    add("--heads", default="32/8", metavar="QUERY/KV")
    add("--repeats", type=int, default=25)


def run(options: argparse.Namespace, results: Results) -> None:
    """Measure both rules of hashevict."""
    query_heads, kv_heads = map(int, options.heads.split("/"))
    shape = Shape(query_heads, kv_heads, options.head_dim)
    cells = [
        (rule, budget) for rule in ("instant", "vote") for budget in options.budgets
    ]
    for rule, budget in show_progress(cells, "evict-parts"):
        seconds = measure(rule, budget, shape, options)
        results.add({"rule": rule, "budget": budget, "seconds": seconds})
        parts = ", ".join(
            f"{name} {timing.show(spread, 1e6)}" for name, spread in seconds.items()
        )
        results.say(f"{rule} C={budget}, us of a layer: {parts}")


def measure(
    rule: str, budget: int, shape: Shape, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Seconds of every part, with spread; attention in between, not counted."""
    batch = options.batch
    policy = resolve(rule, options.bits, budget, shape)
    layer = BudgetedLayer(policy, shape, batch, budget)
    layer.fill_metadata(4 * budget)
    q, k, v = shape.tokens(batch)
    places, pages = addresses(q, k, v), layer.pages
    table, projection, k_map, v_map, geometry, numbers, strengths, _ = layer._common
    random = np.random.default_rng(0)
    attention = Attention(
        layer.cache, list(range(batch)), [1] * batch, [budget] * batch
    )
    output = torch.empty_like(q)
    stock = torch.cat([layer.cache.flat_slots(i, budget - 1, 1) for i in range(batch)])
    where = (pages.elements, pages.tail, k_map, v_map, geometry)
    common = (where, (numbers, projection, geometry[8], strengths), places, table)

    def write(step: int) -> None:
        slots = random.integers(0, budget, (batch, shape.kv_heads))
        _write(*common, slots)

    parts: dict[str, timing.Part] = {
        "stock's update": lambda _: layer.cache.write(k, v, stock),
        "hash": lambda _: _hash(*common, rule == "instant"),
        "scan": lambda _: _scan(*common, budget, policy.recent),
        "write": write,
    }
    if rule == "vote":
        parts["frame"] = lambda _: _frame(*common)
        parts["ballot"] = lambda _: _ballot(*common, budget)
    spaced: dict[str, timing.Part] = {}
    for name, part in parts.items():
        # What a part reads has left the nearer caches, as between two layers.
        spaced[f"before {name}"] = lambda _: attention(q, output)
        spaced[name] = part
    seconds = timing.interleaved(spaced, options.repeats)
    return {name: timing.Spread.of(seconds[name]).as_dict() for name in parts}


@njit(nogil=True)
def _write(where, numbers, places, table, slots):
    pages, tokens = pages_of(*where), tokens_at(places, where[0])
    table = unowned(table)
    for row in range(len(table)):
        for head in range(pages.heads):
            copy_in(pages, tokens, row, table[row], slots[row, head], head)


@njit(nogil=True)
def _hash(where, numbers, places, table, queries):
    pages, rule = pages_of(*where), rule_of(*numbers)
    tokens = tokens_at(places, where[0])
    own_scratch = new_scratch(pages, rule, tokens)
    own_chosen = new_chosen(pages, own_scratch)
    scratch, chosen = unowned_scratch(own_scratch), unowned_chosen(own_chosen)
    words = np.empty((rule.bits + 31) // 32, np.int32)
    for row in range(len(table)):
        for head in range(pages.heads):
            load_new_key(pages, tokens, row, head, scratch.key)
            hash_row(scratch.key, rule.projection, scratch.key_dots, words)
            if queries:
                merged = chosen.merged[head]
                merge_queries(pages, rule, tokens, row, head, scratch, merged)
    hold(own_scratch, own_chosen)


@njit(nogil=True)
def _scan(where, numbers, places, table, budget, recent):
    pages, rule, table = pages_of(*where), rule_of(*numbers), unowned(table)
    scratch = new_scratch(pages, rule, tokens_at(places, where[0]))
    chosen, total, t = new_chosen(pages, scratch), np.int64(0), 5 * budget
    merged, best, scores = chosen.merged, chosen.best, scratch.scores
    for row in range(len(table)):
        for head in range(pages.heads):
            reset_best(best[head])
        for first in range(0, budget, pages.block_size):
            for head in range(pages.heads):
                blocks = table[row]
                scan_block(
                    pages,
                    rule,
                    blocks,
                    first,
                    budget,
                    head,
                    t,
                    recent,
                    merged,
                    scores,
                    best,
                )
        for head in range(pages.heads):
            total += best_slot(best[head])
    return total


@njit(nogil=True)
def _frame(where, numbers, places, table):
    pages, rule, table = pages_of(*where), rule_of(*numbers), unowned(table)
    tokens = tokens_at(places, where[0])
    scratch, frame = new_scratch(pages, rule, tokens), np.empty(3 * pages.dim)
    lanes = adjacent_keys(pages.k_map, rule.sinks)
    key, dots, words = scratch.key, scratch.key_dots, scratch.words
    for row in range(len(table)):
        for head in range(pages.heads):
            frame_of(pages, table[row], head, lanes, rule.sinks, scratch.x, frame)
            load_new_key(pages, tokens, row, head, key)
            describe_in(key, frame, rule.projection, dots, words)


@njit(nogil=True)
def _ballot(where, numbers, places, table, budget):
    pages, rule, table = pages_of(*where), rule_of(*numbers), unowned(table)
    tokens, frame = tokens_at(places, where[0]), np.zeros(3 * pages.dim)
    for row in range(len(table)):
        for head in range(pages.heads):
            blocks, t = table[row], 5 * budget
            cast_votes(pages, rule, tokens, row, blocks, budget, head, frame, t)
