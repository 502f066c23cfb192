"""How long the kernels of a decode step take on this GPU, against their byte floor.

A layer of Llama-3-8B with 8 requests, each with a full budget. Kernels are replayed
from a CUDA graph, as in a server, so that launches by the host do not count. The floor
is `hashevict_vllm.kernels.triton.report.floor_bytes` over the bandwidth that copying
reaches on this GPU in the same run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from statistics import median

import torch

from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.pages import view_pages
from hashevict_vllm.kernels.projection import make_projection
from hashevict_vllm.kernels.triton import ops
from hashevict_vllm.kernels.triton.arguments import (
    Estimate,
    Page,
    Scratch,
    Signed,
    Step,
    Tokens,
)
from hashevict_vllm.kernels.triton.report import floor_bytes
from hashevict_vllm.kernels.triton.shapes import Shape
from hashevict_vllm.verify.checks import PASSED, Check

REPEATS = 20
"""Launches in a graph."""

COPIED_BYTES = 1 << 30


def microseconds(launch: Callable[[], object]) -> float:
    """Median time of one launch, in a graph of `REPEATS`."""
    launch()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            launch()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / REPEATS)
    return median(times)


def bandwidth() -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / (microseconds(lambda: target.copy_(source)) * 1e-6)


def launches(
    shape: Shape, device: str = "cuda"
) -> tuple[dict[str, Callable[[], object]], torch.Tensor]:
    """The launches of one decode step in which every request evicts.

    Returns:
        The launches by their kernel's name, in order; the plan that the first makes.

    """
    rule, tokens, heads, dim = shape.rule, shape.tokens, shape.heads, shape.head_dim

    def ints(*sizes: int) -> torch.Tensor:
        return torch.zeros(sizes, dtype=torch.int32, device=device)

    def floats(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, dtype=shape.dtype, device=device)

    blocks = -(-shape.budget // shape.block_size)
    content = heads * shape.block_size * 2 * dim
    tail_bytes = heads * (rule.words + 1) * shape.block_size * 4
    size = content + tail_bytes // shape.dtype.itemsize
    cache = floats(tokens * blocks, size)[:, :content]
    pages = view_pages(
        cache.unflatten(1, (heads, shape.block_size, 2 * dim)), rule.words
    )
    pages.tail.copy_(torch.randint_like(pages.tail, 0, 2**31 - 1))
    slots = torch.arange(tokens * blocks * shape.block_size, device=device)
    position = (slots % (blocks * shape.block_size)).view(-1, 1, shape.block_size)
    pages.tail[:, :, -1] = position.int()
    table = torch.arange(tokens * blocks, device=device).int().view(tokens, blocks)
    q, k = floats(tokens, heads * shape.group, dim), floats(tokens, heads, dim)
    projection = make_projection(dim, max(rule.bits, 1), 0, True).to(device)
    signed = Signed(
        ints(tokens, heads, shape.group + 1, rule.hashed),
        torch.zeros(tokens, heads, shape.group + 1, device=device),
    )
    # Positions at which every token casts a ballot, if its rule has any.
    length = (shape.budget // rule.every + 1) * rule.every + 1
    starts = torch.arange(tokens + 1, device=device).int()
    lens = ints(tokens) + length
    pieces, live, owner = ints(tokens, ops.NUM_COLUMNS), ints(tokens), ints(tokens)
    budgets, recents = ints(tokens) + shape.budget, ints(tokens) + shape.budget // 4
    requests = (starts, lens, ints(tokens), budgets, recents)
    plan = (*requests, ints(tokens), pieces, live, owner)
    page = Page.of(pages)
    step = Step.of(pieces, owner, table, heads)
    estimate = Estimate.of(projection, 0.125, 0.02, 0.85)
    layer = (Tokens.of(q, k, k), signed, step._replace(token_piece=None), page)
    scratch = Scratch.of(rule, tokens * heads, shape.group, dim, q.device)
    queries = torch.empty_like(q) if rule.votes else None
    made: dict[str, Callable[[], object]] = {
        "plan": lambda: ops.plan(*plan, rule, True)
    }
    if rule.signs:
        made["sign"] = lambda: ops.sign(layer[0], projection, signed, rule)
    made["write"] = lambda: ops.write(*layer, rule, True, queries=queries)
    if rule.votes:
        asking = (Tokens.asking(q), step, page, estimate, scratch, rule)
        made["ballot"] = lambda: ops.ballot(*asking)
    return made, pieces


def run() -> Iterator[Check]:
    """Time both rules of HashEvict; nothing to pass or fail."""
    reached = bandwidth()
    yield Check("time", "copy", PASSED, f"{reached / 1e12:.2f} TB/s")
    for kind, label in ((codes.HAMMING_TO_QUERY, "instant"), (codes.VOTE, "vote")):
        shape = dataclasses.replace(Shape(), kind=kind)
        floors = floor_bytes(shape)
        for name, launch in launches(shape)[0].items():
            taken, floor = microseconds(launch), floors[name] / reached * 1e6
            detail = f"{taken:.1f} µs, floor {floor:.2f} µs ({floors[name]:,} bytes)"
            yield Check("time", f"{name} ({label})", PASSED, detail)
