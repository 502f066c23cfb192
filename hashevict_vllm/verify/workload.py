"""Launches of one layer on random tokens, as a server makes them, to be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hashevict_vllm.kernels.pages import DevicePages, view_pages
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
from hashevict_vllm.kernels.triton.pieces import NAMES
from hashevict_vllm.kernels.triton.shapes import Shape

Launches = dict[str, Callable[[], object]]
"""By the kernel's name, in the order of a step."""


@dataclass(frozen=True)
class _Layer:
    """Random tokens of a step, and pages full of random keys.

    Attributes:
        shape: Of the layer.
        device: Where.
        requests: R.
        slots: Of each; slot i holds position i.
        tokens: T of the step.

    """

    shape: Shape
    device: str
    requests: int
    slots: int
    tokens: int

    def ints(self, *sizes: int) -> torch.Tensor:
        return torch.zeros(sizes, dtype=torch.int32, device=self.device)

    def floats(self, *sizes: int) -> torch.Tensor:
        return torch.randn(sizes, dtype=self.shape.dtype, device=self.device)

    @property
    def blocks(self) -> int:
        """Of one request."""
        return -(-self.slots // self.shape.block_size)

    def pages(self) -> DevicePages:
        """Pages whose tails hold any words, and positions."""
        shape, words = self.shape, self.shape.rule.words
        content = shape.heads * shape.block_size * 2 * shape.head_dim
        tail_bytes = shape.heads * (words + 1) * shape.block_size * 4
        size = content + tail_bytes // shape.dtype.itemsize
        cache = self.floats(self.requests * self.blocks, size)[:, :content]
        inner = (shape.heads, shape.block_size, 2 * shape.head_dim)
        pages = view_pages(cache.unflatten(1, inner), words)
        pages.tail.copy_(torch.randint_like(pages.tail, 0, 2**31 - 1))
        slots = torch.arange(self.blocks * shape.block_size, device=self.device)
        position = slots.int().view(self.blocks, 1, shape.block_size)
        pages.tail[:, :, -1] = position.repeat(self.requests, 1, 1)
        return pages

    def table(self) -> torch.Tensor:
        """int32 [R, blocks]."""
        blocks = torch.arange(self.requests * self.blocks, device=self.device)
        return blocks.int().view(self.requests, self.blocks)

    def step_tokens(self) -> Tokens:
        shape = self.shape
        k = self.floats(self.tokens, shape.heads, shape.head_dim)
        q = self.floats(self.tokens, shape.heads * shape.group, shape.head_dim)
        return Tokens.of(q, k, k)

    def signed(self) -> Signed:
        """Room for signatures."""
        shape = self.shape
        members = (self.tokens, shape.heads, shape.group + 1)
        squares = torch.zeros(members, device=self.device)
        return Signed(self.ints(*members, shape.rule.hashed), squares)

    def estimate(self) -> Estimate:
        rule, dim = self.shape.rule, self.shape.head_dim
        projection = make_projection(dim, max(rule.bits, 1), 0, True)
        numbers = (0.125, 0.02, 0.95, 1024.0, 1.0)
        return Estimate.of(projection.to(self.device), *numbers)


def decode_launches(
    shape: Shape, device: str = "cuda"
) -> tuple[Launches, torch.Tensor]:
    """The launches of one decode step in which every request evicts.

    Returns:
        The launches by their kernel's name, in order; the plan that the first makes.

    """
    rule, count = shape.rule, shape.tokens
    layer = _Layer(shape, device, count, shape.budget, count)
    ints = layer.ints
    # Positions at which every token casts a ballot, if its rule has any.
    length = (shape.budget // rule.every + 1) * rule.every + 1
    starts = torch.arange(count + 1, device=device).int()
    pieces, live, owner = ints(count, ops.NUM_COLUMNS), ints(count), ints(count)
    lens = ints(count) + length
    budgets, recents = ints(count) + shape.budget, ints(count) + shape.budget // 4
    requests = (starts, lens, ints(count), budgets, recents)
    plan = (*requests, ints(count), pieces, live, owner)
    tokens, signed, estimate = layer.step_tokens(), layer.signed(), layer.estimate()
    page = Page.of(layer.pages())
    step = Step.of(pieces, owner, layer.table(), shape.heads)
    written = (tokens, signed, step._replace(token_piece=None), page)
    queries = torch.empty_like(tokens.q) if rule.votes else None
    made: Launches = {"plan": lambda: ops.plan(*plan, rule, True)}
    if rule.signs:
        made["sign"] = lambda: ops.sign(tokens, estimate.projection, signed, rule)
    made["write"] = lambda: ops.write(*written, rule, True, queries=queries)
    if rule.votes:
        scratch = Scratch.of(
            *(rule, count * shape.heads, shape.group, shape.head_dim), tokens.q.device
        )
        asking = (Tokens.asking(tokens.q), step, page, estimate, scratch, rule)
        made["ballot"] = lambda: ops.ballot(*asking)
    return made, pieces


def segment_launches(
    shape: Shape, device: str = "cuda"
) -> tuple[Launches, DevicePages]:
    """What a lone segment launches that a full budget is reduced after, with votes.

    ``end`` begins with ``restore``, which makes the segment complete again, so that it
    may be launched over and over; K and V stay where the last reduction moved them.

    Returns:
        The launches by name; the pages that they work on.

    """
    rule, count, budget = shape.rule, shape.segment, shape.budget
    layer = _Layer(shape, device, 1, shape.bound, count)
    columns = dict.fromkeys(NAMES, 0) | {
        "start": budget,
        "count": count,
        "slot": budget,
        "budget": budget,
        "recent": budget // 4,
        "compact": 1,
        "first_voter": count - rule.window,
        "live": shape.bound,
    }
    pieces = torch.tensor([[columns[name] for name in NAMES]], device=device).int()
    tokens, signed, estimate = layer.step_tokens(), layer.signed(), layer.estimate()
    pages = layer.pages()
    pages.tail[:, :, rule.words - 1] = 0  # no votes yet
    page = Page.of(pages)
    step = Step.of(pieces, layer.ints(count), layer.table(), shape.heads)
    told = (tokens, signed, step, page)

    def write() -> None:
        ops.write(*told, rule, False)

    def describe() -> None:
        ops.describe(step, page, estimate.projection, rule)

    write()
    describe()
    complete = pages.tail.clone()

    def restore() -> None:
        pages.tail.copy_(complete)

    def end() -> None:
        restore()
        ops.mark(*told, estimate, rule, shape.bound, shape.bound)
        ops.compact(step, page, rule, shape.bound)

    made: Launches = {
        "write, no scan": write,
        "describe": describe,
        "restore": restore,
        "end": end,
    }
    return made, pages
