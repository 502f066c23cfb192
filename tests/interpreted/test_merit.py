"""What slots are worth to a reduction: pooled votes, and credit for values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
import triton.language as tl

from hashevict_vllm.verify.interpreter import allow_triton

allow_triton()

from support.oracle import resolve  # noqa: E402
from support.paged_triton import LAYOUTS, make_pages  # noqa: E402
from support.races import watched  # noqa: E402

from hashevict_vllm.attention.gpu.rule import device_rule  # noqa: E402
from hashevict_vllm.kernels.codes import PROMPT_ENDS, PROMPT_GOES_ON  # noqa: E402
from hashevict_vllm.kernels.triton import launch, value  # noqa: E402
from hashevict_vllm.kernels.triton.arguments import Page, Sizes, Step  # noqa: E402
from hashevict_vllm.kernels.triton.pieces import NAMES  # noqa: E402
from hashevict_vllm.kernels.triton.reduce import merit_of  # noqa: E402
from hashevict_vllm.policies.vote import Vote  # noqa: E402
from hashevict_vllm.resolved import ResolvedKVPolicy  # noqa: E402

HEADS, BLOCK, LONGEST, SINKS = 2, 16, 203, 3
PIECES = [
    (96, 24, PROMPT_GOES_ON),
    (41, 20, PROMPT_ENDS),
    (50, 24, 0),
    (33, 28, PROMPT_ENDS),
]
"""Slots, the budget, and why the live set is reduced afterwards, if it is."""

SMALL = {"POOL_TILE": 16, "VALUE_ELEMENTS": 256, "VALUE_SLICES": 2}
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """What is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def put(*at: tuple[int, float]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Values [n, Hkv, D] with a number in one element of some slots."""

    def changed(v: torch.Tensor) -> torch.Tensor:
        v = v.clone()
        for slot, x in at:
            v[slot, :, 1] = x
        return v

    return changed


VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "all equal": lambda v: torch.full_like(v, 0.5),
    "all but two are the mean": lambda v: put((10, 1.0), (25, -1.0))(v * 0),
    "NaN": put((30, NAN)),
    "infinite": put((30, -INF)),
    "NaN in a sink": put((SINKS - 1, NAN)),
    "squares beyond float32": lambda v: v * 1e25,
}


class Reduced:
    """Pages full of votes, positions and values; what slots in them are worth."""

    def __init__(
        self, policy: ResolvedKVPolicy, dim: int, dtype: torch.dtype, layout: str
    ) -> None:
        self.policy, self.dim = policy, dim
        self.rule = device_rule(policy)
        width = -(-max(n for n, _, _ in PIECES) // BLOCK)
        blocks = len(PIECES) * width
        _, self.pages = make_pages(
            layout, blocks + 1, HEADS, BLOCK, dim, self.rule.words, dtype
        )
        order = torch.randperm(blocks) + 1
        self.table = order.view(len(PIECES), width).int()

    def fill(
        self, request: int, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Fill a request's slots; positions, votes and values as the oracle has them.

        Returns:
            int64 [Hkv, n], float32 [Hkv, n], float32 [Hkv, n, D].

        """
        n, first, pages = PIECES[request][0], self.policy.sinks, self.pages
        later = [torch.randperm(LONGEST - first)[: n - first] for _ in range(HEADS)]
        position = torch.stack(
            [torch.cat([torch.arange(first), first + x]) for x in later]
        )
        votes = torch.rand(HEADS, n).square()
        slots = torch.arange(n)
        block, slot = self.table[request].long()[slots // BLOCK], slots % BLOCK
        pages.v[block, :, slot] = change(torch.randn(n, HEADS, self.dim)).to(
            pages.v.dtype
        )
        pages.tail[block, :, -1, slot] = position.T.int()
        pages.tail[block, :, -2, slot] = votes.T.contiguous().view(torch.int32)
        return position, votes, pages.v[block, :, slot].float().transpose(0, 1)

    def merit(self, bound: int, requests: list[int]) -> torch.Tensor:
        """By the kernels: float32 [P, Hkv, bound]."""
        rows = []
        for request in requests:
            slots, budget, compact = PIECES[request]
            columns = {"request": request, "budget": budget, "compact": compact}
            columns |= {"slot": budget, "count": slots - budget}
            rows.append([columns.get(name, 0) for name in NAMES])
        step = Step.of(torch.tensor(rows).int(), None, self.table, HEADS)
        page = Page.of(self.pages)
        credit = self.policy.credit
        sizes = Sizes.of(self.rule, page, 1)
        return merit_of(step, page, credit, self.rule, sizes, bound, LONGEST)


def compare(
    change: Callable[[torch.Tensor], torch.Tensor] = lambda v: v,
    dtype: torch.dtype = torch.float32,
    dim: int = 16,
    sinks: int = SINKS,
    pool: int = 15,
    weight: float = 64.0,
    layout: str = LAYOUTS[0],
) -> Reduced:
    """Compare kernels with the oracle, and a batch with one of its requests alone."""
    torch.manual_seed(0)
    numbers = {"budget": 24, "segment": 16, "sinks": sinks, "recent": 3}
    votes = {"scoring": "vote", "pool": pool, "value_weight": weight}
    policy = resolve({**numbers, **votes}, BLOCK)
    layer = Reduced(policy, dim, dtype, layout)
    told = [layer.fill(request, change) for request in range(len(PIECES))]
    bound = max(n for n, _, _ in PIECES)
    merit = layer.merit(bound, list(range(len(PIECES))))
    for request, (slots, budget, compact) in enumerate(PIECES):
        if compact:
            oracle = Vote(replace(policy, budget=budget))
            expected = oracle.merit(*told[request], compact == PROMPT_GOES_ON)
            torch.testing.assert_close(merit[request, :, :slots], expected)
    (alone,) = layer.merit(PIECES[1][0], [1])
    assert torch.equal(alone, merit[1, :, : PIECES[1][0]])
    return layer


@pytest.mark.parametrize(
    ("dtype", "dim", "sinks", "pool", "layout"),
    [
        (torch.float32, 16, 3, 15, LAYOUTS[0]),
        (torch.float16, 24, 0, 1, LAYOUTS[1]),
        (torch.bfloat16, 80, 1, 4, LAYOUTS[2]),
    ],
)
def test_merit_equals_the_oracle(
    dtype: torch.dtype, dim: int, sinks: int, pool: int, layout: str
) -> None:
    with (
        mock.patch.multiple(launch, **SMALL),
        mock.patch.object(value, "_AT_ONCE", tl.constexpr(2)),
    ):
        compare(dtype=dtype, dim=dim, sinks=sinks, pool=pool, layout=layout)


@pytest.mark.parametrize("name", VALUES)
def test_merit_equals_the_oracle_where_distances_degenerate(name: str) -> None:
    compare(VALUES[name])


def test_without_weight_no_value_is_read() -> None:
    with watched() as races:
        compare(VALUES["NaN"], weight=0.0)
    assert set(races.launches) == {"pool_kernel"}


def test_merit_is_a_number_however_far_a_sink_is() -> None:
    torch.manual_seed(0)
    policy = resolve(
        {"scoring": "vote", "budget": 24, "segment": 16, "sinks": 3, "recent": 3}, BLOCK
    )
    layer = Reduced(policy, 16, torch.float32, LAYOUTS[0])
    layer.fill(0, put((0, 1e18)))
    assert bool(layer.merit(PIECES[0][0], [0]).isfinite().all())
