"""The step that ``verify`` times on a GPU does what it says, interpreted."""

from __future__ import annotations

import pytest
import torch

from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.triton.pieces import NAMES
from hashevict_vllm.kernels.triton.shapes import Shape
from hashevict_vllm.verify.timing import launches


@pytest.mark.parametrize("kind", [codes.HAMMING_TO_QUERY, codes.VOTE])
def test_every_request_of_the_timed_step_evicts(kind: int) -> None:
    shape = Shape(
        kind=kind, head_dim=16, dtype=torch.float32, heads=1, group=2, bits=16,
        budget=320, tokens=2,
    )  # fmt: skip
    made, pieces = launches(shape, "cpu")
    for launch in made.values():
        launch()
    columns = {name: pieces[:, index].tolist() for index, name in enumerate(NAMES)}
    assert columns["evict"] == [1, 1]
    assert columns["live"] == [320, 320]
    ballots = kind == codes.VOTE
    assert (columns["first_voter"] == [0, 0]) == ballots
    assert set(made) == {"plan", "write", "ballot" if ballots else "sign"}
