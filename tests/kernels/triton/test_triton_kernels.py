"""The Triton kernels: equal to the oracle in the interpreter, frugal when compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.triton import cost
from hashevict_vllm.kernels.triton.aot import (
    ARCHITECTURES,
    compile_launch,
    recorded_launches,
)
from hashevict_vllm.kernels.triton.machine import MachineCode
from hashevict_vllm.kernels.triton.shapes import SHAPES, Shape

_INTERPRETED = Path(__file__).parents[2] / "interpreted"


@pytest.mark.parametrize(
    "path", sorted(_INTERPRETED.glob("test_*.py")), ids=lambda p: p.stem
)
def test_kernels_equal_the_oracle_in_the_interpreter(path: Path) -> None:
    """Runs a file of `tests/interpreted` in a process that imports Triton anew."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    # Its conftest alone: that of the other tests starts vLLM.
    command += ["--confcutdir", str(_INTERPRETED), str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]  # of the xdist worker that this process may be
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        cwd=_INTERPRETED.parent,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Triton's cache of compiled kernels, away from the user's."""
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills_or_local_memory(
    name: str, architecture: int
) -> None:
    launches = SHAPES[name].launches()
    assert {launch.name for launch in launches} >= {"plan", "write", "pair", "move"}
    for launch in launches:
        if launch.runs_on(architecture):
            resources = compile_launch(launch, architecture)
            assert resources.stack == resources.local == 0, launch.name
            assert resources.registers * resources.threads <= 32768, launch.name
            assert resources.shared <= 48 * 1024, launch.name


@pytest.mark.parametrize(
    "name", ["key, float16, D 64, 16 bits", "query, float32, D 256, 128 bits"]
)
def test_kernels_compile_for_turing_which_xformers_serves(name: str) -> None:
    for launch in SHAPES[name].launches():
        assert compile_launch(launch, 75).stack == 0, launch.name


@triton.jit
def _chained_kernel(first, second, out, n, N: tl.constexpr):
    """One load names the next, and that the next."""
    lane = tl.arange(0, N)
    at = tl.load(second + tl.load(first + lane))
    total = tl.zeros([N], tl.int32)
    for i in range(n):
        total += tl.load(out + at + i)
    tl.store(out + lane, total)


def test_loads_in_turn_and_loops_are_read_from_machine_code() -> None:
    x = torch.zeros(64).int()
    with recorded_launches() as launches:
        _chained_kernel[(1,)](x, x, x, 5, N=32, num_warps=1)
    code = MachineCode.of(compile_launch(launches[0], 90).cubin)
    assert code.loads_in_turn == 3
    assert code.loops
    once, thrice = (code.executed([n] * len(code.loops)) for n in (1, 3))
    bodies = sum((last - first) // 16 + 1 for first, last in code.loops)
    assert once == len(code.instructions)
    assert thrice == once + 2 * bodies
    with pytest.raises(ValueError, match="loops, and trips for 0"):
        code.executed([])


@pytest.mark.parametrize("budget", [1024, 4096])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_a_decode_step_should_take_three_percent_longer_at_most(
    batch: int, budget: int
) -> None:
    layer = cost.decode_layer(batch, budget)
    assert 0 < layer.percent <= layer.mean <= layer.voting < 3.05
    assert layer.beside.microseconds <= 0.7 * layer.stock  # whoever votes
    if budget == 1024:
        assert batch > 8 or layer.before.microseconds <= 4


def test_the_end_of_a_segment_should_cost_a_twentieth_of_reading_it() -> None:
    assert 0 < cost.prompt_percent() <= 5
    assert cost.prompt_microseconds() > sum(
        c.microseconds for c in cost.prompt_end().values()
    )


@pytest.mark.parametrize("kind", sorted({*range(codes.VOTE + 1)} - {codes.KEY_DIFF}))
def test_only_rules_whose_choice_depends_on_the_token_replay_a_prompt(
    kind: int,
) -> None:
    names = {launch.name for launch in Shape(kind=kind).launches()}
    asks = (codes.HAMMING_TO_KEY, codes.HAMMING_TO_QUERY, codes.RANDOM)
    assert ("replay" in names, "select" in names) == (kind in asks, kind not in asks)


def test_distances_are_counted_by_one_instruction_per_word() -> None:
    shape = Shape(kind=codes.HAMMING_TO_QUERY)
    write = next(launch for launch in shape.launches() if launch.name == "write")
    ptx = compile_launch(write, 90).ptx
    per_thread = 1024 // 256  # slots of a tile
    assert ptx.count("popc.b32") == per_thread * shape.group * shape.rule.words
