"""The launches that ``verify`` times on a GPU do what it says, interpreted."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.triton.cost import Cost, Expectation, Layer
from hashevict_vllm.kernels.triton.pieces import NAMES
from hashevict_vllm.kernels.triton.shapes import Shape
from hashevict_vllm.verify.bench.launches import time_launches
from hashevict_vllm.verify.workload import decode_launches, segment_launches


@pytest.mark.parametrize("kind", [codes.HAMMING_TO_QUERY, codes.VOTE])
def test_every_request_of_the_timed_step_evicts(kind: int) -> None:
    shape = Shape(
        kind=kind, head_dim=16, dtype=torch.float32, heads=1, group=2, bits=16,
        budget=320, tokens=2,
    )  # fmt: skip
    made, pieces = decode_launches(shape, "cpu")
    for launch in made.values():
        launch()
    columns = {name: pieces[:, index].tolist() for index, name in enumerate(NAMES)}
    assert columns["evict"] == [1, 1]
    assert columns["live"] == [320, 320]
    ballots = kind == codes.VOTE
    assert (columns["first_voter"] == [0, 0]) == ballots
    assert set(made) == {"plan", "write", "ballot" if ballots else "sign"}


TINY = Shape(
    kind=codes.VOTE, head_dim=16, dtype=torch.float32, heads=1, group=2, bits=16,
    budget=320, segment=32, tokens=1,
)  # fmt: skip


def test_the_timed_segment_is_reduced_to_the_budget_again_and_again() -> None:
    made, pages = segment_launches(TINY, "cpu")
    for _ in range(2):
        made["end"]()
        survivors = pages.tail[:, 0, -1].flatten()[: TINY.budget].tolist()
        assert len(set(survivors)) == TINY.budget
        assert set(range(4)) < set(survivors)
        assert 0 == min(survivors) < max(survivors) == TINY.bound - 1


def test_every_launch_is_timed_alone_and_in_a_graph() -> None:
    asked: list[bool] = []

    def timer(launch: Callable[[], object], in_graph: bool) -> float:
        start = time.perf_counter()
        launch()
        asked.append(in_graph)
        return (time.perf_counter() - start) * 1e6

    cost = Cost(instructions=1, loads=1, waves=1, microseconds=3.0)
    layer = Layer(100.0, cost, cost, percent=2.0, voting=3.0, mean=2.5)
    expectation = Expectation(lambda *_: layer, lambda: 144.0, lambda: 4.0)
    grid = ((1,), (320,), 32, timer)
    rows = list(time_launches(TINY, *grid, device="cpu", expectation=expectation))
    names = ("plan", "write", "ballot")
    wheres = ("launched by the host", "in a CUDA graph")
    decode = [f"`{name}`, {where}" for name in names for where in wheres]
    assert [row.what for row in rows[:6]] == decode
    assert [row.what for row in rows[6:]] == [
        f"{what}, {where}"
        for where in wheres
        for what in ("`write, no scan`", "`describe`", "the end of a segment")
    ]
    assert asked.count(True) == asked.count(False) == 7
    in_graph = [row for row in rows if "graph" in row.what]
    assert [row.expected for row in in_graph] == [None, 3.0, 3.0, None, None, 144.0]
    assert [row.promise for row in in_graph] == [None, 4.0, None, None, None, None]
    assert all(row.seconds is not None and row.seconds > 0 for row in rows)
