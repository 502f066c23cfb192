"""``evict-parts``: what the eviction step of one layer consists of, in cold caches.

Each part is run alone for all requests and heads, after attention over the same cache:
hashes, the scan with its scores, the write of K and V to arbitrary slots; for votes the
centre and a ballot, which one step of ``vote_every`` takes. They need not add up to the
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
from hashevict_vllm.kernels.cpu_centre import adjacent_keys, centre_of
from hashevict_vllm.kernels.cpu_hamming import merged_shape
from hashevict_vllm.kernels.cpu_hash import hash_row
from hashevict_vllm.kernels.cpu_scan import BEST_SIZE, best_slot, reset_best
from hashevict_vllm.kernels.cpu_scores import merge_queries, scan_block
from hashevict_vllm.kernels.cpu_slots import borrowed, copy_in
from hashevict_vllm.kernels.cpu_tokens import addresses, load_new_key, tokens_at
from hashevict_vllm.kernels.cpu_votes import cast_votes


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
    common = (pages.elements, pages.tail, places, table, geometry, numbers)

    def write(step: int) -> None:
        slots = random.integers(0, budget, (batch, shape.kv_heads))
        _write(*common, k_map, v_map, slots)

    parts: dict[str, timing.Part] = {
        "stock's update": lambda _: layer.cache.write(k, v, stock),
        "hash": lambda _: _hash(*common, projection, rule == "instant"),
        "scan": lambda _: _scan(*common, budget),
        "write": write,
    }
    if rule == "vote":
        parts["centre"] = lambda _: _centre(*common, k_map)
        parts["ballot"] = lambda _: _ballot(*common, projection, strengths, budget)
    spaced: dict[str, timing.Part] = {}
    for name, part in parts.items():
        # What a part reads has left the nearer caches, as between two layers.
        spaced[f"before {name}"] = lambda _: attention(q, output)
        spaced[name] = part
    seconds = timing.interleaved(spaced, options.repeats)
    return {name: timing.Spread.of(seconds[name]).as_dict() for name in parts}


@njit(nogil=True)
def _write(elements, tail, places, table, geometry, rule, k_map, v_map, slots):
    tokens = tokens_at(places, elements)
    elements, table = borrowed(elements), borrowed(table)
    for row in range(len(table)):
        for head in range(geometry[0]):
            slot, blocks = slots[row, head], table[row]
            copy_in(elements, tokens, row, blocks, slot, head, k_map, v_map, geometry)


@njit(nogil=True)
def _hash(elements, tail, places, table, geometry, rule, projection, queries):
    tokens = tokens_at(places, elements)
    b, words, group = geometry[8], (geometry[8] + 31) // 32, tokens.group
    x, dots = np.empty(group * geometry[2], np.float32), np.empty(group * b, np.float32)
    y, key_dots = np.empty(geometry[2], np.float32), np.empty(b, np.float32)
    sources, key = np.empty((group, words), np.int32), np.empty(words, np.int32)
    merged = np.zeros(merged_shape(group, words), np.int32)
    for row in range(len(table)):
        for head in range(geometry[0]):
            load_new_key(tokens, row, head, geometry, y)
            hash_row(y, projection, key_dots, key)
            if queries:
                merge_queries(
                    tokens, row, head, projection, x, dots, sources, geometry, merged
                )


@njit(nogil=True)
def _scan(elements, tail, places, table, geometry, rule, budget):
    tail, table = borrowed(tail), borrowed(table)
    group, heads, block_size = places[7], geometry[0], geometry[1]
    merged = np.zeros((heads, group + 2, geometry[3]), np.int32)
    best, scratch = (
        np.empty((heads, BEST_SIZE), np.int32),
        np.empty(block_size, np.int32),
    )
    total = np.int64(0)
    for row in range(len(table)):
        for head in range(heads):
            reset_best(best[head])
        for first in range(0, budget, block_size):
            for head in range(heads):
                scan_block(
                    tail,
                    table[row],
                    first,
                    budget,
                    head,
                    merged,
                    group,
                    5 * budget,
                    geometry,
                    rule,
                    scratch,
                    best,
                    head,
                )
        for head in range(heads):
            total += best_slot(best[head])
    return total


@njit(nogil=True)
def _centre(elements, tail, places, table, geometry, rule, k_map):
    elements, table = borrowed(elements), borrowed(table)
    lanes = adjacent_keys(k_map, rule[0])
    x, centre = np.empty(geometry[2], np.float32), np.empty(geometry[2], np.float32)
    for row in range(len(table)):
        for head in range(geometry[0]):
            centre_of(
                elements, table[row], head, k_map, lanes, geometry, rule[0], x, centre
            )


@njit(nogil=True)
def _ballot(
    elements, tail, places, table, geometry, rule, projection, strengths, budget
):
    tokens = tokens_at(places, elements)
    tail, table = borrowed(tail), borrowed(table)
    for row in range(len(table)):
        for head in range(geometry[0]):
            cast_votes(
                tail,
                tokens,
                row,
                table[row],
                budget,
                head,
                projection,
                geometry,
                rule,
                strengths,
                5 * budget,
            )
