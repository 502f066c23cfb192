"""No two programs of a launch race, nor does a ballot race with what runs beside it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

from hashevict_vllm.verify.interpreter import allow_triton

allow_triton()

from support.oracle import resolve  # noqa: E402
from support.paged_triton import TritonLayer  # noqa: E402
from support.races import fork_of, watched  # noqa: E402
from support.wrapped import Run, policy_of  # noqa: E402

from hashevict_vllm.attention.gpu.fork import Fork  # noqa: E402
from hashevict_vllm.kernels.triton import launch  # noqa: E402


@triton.jit
def _shift_kernel(x, N: tl.constexpr, BY: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(x + at + BY, tl.load(x + at))


@pytest.mark.parametrize(("by", "bytes_"), [(0, 0), (1, 4)])
def test_a_kernel_with_a_race_put_in_on_purpose_is_found(by: int, bytes_: int) -> None:
    x = torch.arange(9).int()
    with watched() as races:
        _shift_kernel[(2,)](x, N=4, BY=by)
    assert races.launches == ["_shift_kernel"]
    expected = f"_shift_kernel: programs race for {bytes_} bytes"
    assert races.found == ([expected] if by else [])


@pytest.mark.parametrize("apart", [True, False])
def test_forked_work_that_touches_what_runs_beside_it_is_found(apart: bool) -> None:
    x, fork = torch.arange(16).int(), fork_of()
    with watched() as races:
        fork.start(lambda: _shift_kernel[(1,)](x, N=4, BY=0))
        _shift_kernel[(1,)](x[8:] if apart else x[2:], N=4, BY=0)
        fork.join()
        _shift_kernel[(1,)](x, N=4, BY=0)  # after the join
    assert races.forks == 1
    assert races.found == ([] if apart else ["forked work races for 8 bytes"])


@pytest.mark.parametrize(
    "options",
    [
        {"scoring": "vote", "hash_bits": 16, "window": 4, "vote_every": 2},
        {"scoring": "instant", "hash_bits": 16},
        {"name": "l2_norm"},
    ],
    ids=lambda options: options.get("scoring", options.get("name")),
)
def test_programs_of_a_launch_do_not_race(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    prompts, totals, dim = [44, 20], [48, 24], 16
    sizes = {"budget": 30, "segment": 32, "sinks": 4, "recent": 4}
    policy = resolve({**sizes, **options}, 16)
    layer = TritonLayer(policy, prompts, totals, 2, 2, dim, 16, torch.float32)
    # Several programs for a request.
    small = {"POOL_TILE": 16, "VALUE_ELEMENTS": 16 * dim, "VALUE_SLICES": 2}
    with mock.patch.multiple(launch, **small), watched() as races:
        layer.step([tuple(torch.randn(n, h, dim) for h in (4, 2, 2)) for n in prompts])
        for _ in range(4):
            step = [tuple(torch.randn(1, h, dim) for h in (4, 2, 2)) for _ in prompts]
            layer.step(step)
    assert races.found == []
    assert {"plan_kernel", "write_kernel", "move_kernel"} <= set(races.launches)
    for name in ("ballot", "values", "apart", "pool"):
        assert (f"{name}_kernel" in races.launches) == policy.votes


def test_a_ballot_races_with_neither_attention_nor_writes() -> None:
    with watched() as races:
        Run(policy_of("vote", 32), 1, 2, torch.float32, True).check()
    assert races.found == []
    assert races.forks >= 3
    assert "kernel_unified_attention" in " ".join(races.launches)


def test_a_ballot_may_run_as_early_as_it_is_forked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The other tests run it as late as it is joined.
    monkeypatch.setattr(Fork, "start", lambda self, work: work())
    Run(policy_of("vote", "prompt"), 1, 2, torch.float32, True).check()
