"""Launches of a layer of Llama-3.1-8B with votes, alone and inside a CUDA graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from hashevict_vllm.kernels.triton import cost
from hashevict_vllm.kernels.triton.shapes import Shape
from hashevict_vllm.verify.bench.rows import Row
from hashevict_vllm.verify.workload import (
    Launches,
    decode_launches,
    segment_launches,
)

Timer = Callable[[Callable[[], object], bool], float]
"""Microseconds of a launch, within a CUDA graph or not, as `timing.microseconds`."""

BEFORE_ATTENTION = 4.0
"""Promised: microseconds before attention, in a CUDA graph."""

FIRST_CROWD = 8
"""Promised from this batch on: a ballot takes no longer than a stock layer."""


def time_launches(
    shape: Shape,
    batches: tuple[int, ...],
    budgets: tuple[int, ...],
    segment: int,
    timer: Timer,
    device: str = "cuda",
    expectation: cost.Expectation = cost.ON_H100,
) -> Iterator[Row]:
    """Rows of a decode step's launches, then of a prompt's.

    Args:
        shape: The layer; batch, budget and segment are replaced.
        batches: Requests that decode.
        budgets: C; a segment is timed with the first.
        segment: Tokens of a lone segment.
        timer: How launches are timed.
        device: Where.
        expectation: What figures are set against.

    """
    for budget in budgets:
        for batch in batches:
            one = dataclasses.replace(shape, tokens=batch, budget=budget)
            made, _ = decode_launches(one, device)
            size = f"batch {batch}, C {budget:,}"
            for name, seconds, in_graph in _times(made, timer):
                expected, promise = _expected(expectation.layer, name, batch, budget)
                if not in_graph:
                    yield Row(f"`{name}`, launched by the host", size, seconds)
                    continue
                what = f"`{name}`, in a CUDA graph"
                yield Row(what, size, seconds, expected=expected, promise=promise)
    one = dataclasses.replace(shape, budget=budgets[0], segment=segment)
    times = {
        (name, in_graph): seconds
        for name, seconds, in_graph in _times(segment_launches(one, device)[0], timer)
    }
    size = f"{segment:,} tokens, C {budgets[0]:,}"
    for in_graph, where in ((False, "launched by the host"), (True, "in a CUDA graph")):
        for name in ("write, no scan", "describe"):
            yield Row(f"`{name}`, {where}", size, times[name, in_graph])
        seconds = times["end", in_graph] - times["restore", in_graph]
        expected = expectation.prompt_microseconds() if in_graph else None
        yield Row(f"the end of a segment, {where}", size, seconds, expected=expected)


def _times(made: Launches, timer: Timer) -> Iterator[tuple[str, float, bool]]:
    """Name, seconds, and whether in a graph, of every launch."""
    for name, launch in made.items():
        for in_graph in (False, True):
            yield name, timer(launch, in_graph) * 1e-6, in_graph


def _expected(
    layer_of: Callable[[int, int], cost.Layer], name: str, batch: int, budget: int
) -> tuple[float | None, float | None]:
    """Microseconds that are expected and that are promised."""
    if name == "write":
        return layer_of(batch, budget).before.microseconds, BEFORE_ATTENTION
    if name == "ballot":
        layer = layer_of(batch, budget)
        promise = layer.stock if batch >= FIRST_CROWD else None
        return layer.beside.microseconds, promise
    return None, None
