"""``verify --bench`` without a GPU: engines on the CPU, arithmetic, words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from hashevict_vllm.kernels.triton.cost import Cost, Expectation, Layer
from hashevict_vllm.verify.__main__ import main
from hashevict_vllm.verify.bench.engine import Steps
from hashevict_vllm.verify.bench.part import engine_samples
from hashevict_vllm.verify.bench.report import Sample
from hashevict_vllm.verify.bench.rows import Row, table
from hashevict_vllm.verify.bench.run import (
    ROW,
    SAMPLE,
    Outcome,
    all_rows,
    run_part,
    write_json,
)
from hashevict_vllm.verify.bench.sizes import LLAMA_8B, ON_GPU, Sizes

TINY = Sizes(
    model=LLAMA_8B
    | {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 512,
        "intermediate_size": 64,
    },
    dtype="float32",
    itemsize=4,
    batches=(1, 3),
    budgets=(64, 96),
    segment=32,
    prompt=128,
    beside=2,
    steps=8,
    warm_up=2,
    repeats=2,
    policy={"vote_every": 4, "recent": 8},
    engine={"enforce_eager": True, "block_size": 32},
)
ENOUGH = 100 << 30

COST = Cost(instructions=1, loads=1, waves=1, microseconds=3.0)
EXPECTED = Expectation(
    lambda batch, budget: Layer(
        *(100.0, COST, COST), percent=2.0, voting=3.5, mean=2.5 + batch
    ),
    lambda: 144.0,
    lambda: 4.0,
)


def test_engines_are_stepped_with_and_without_a_budget(tmp_path: Path) -> None:
    samples = [
        sample
        for budget in (None, 64)
        for sample in engine_samples(TINY, budget, ENOUGH)
    ]
    assert all(0 < sample.seconds < 10 for sample in samples)
    rows = all_rows([Outcome("", samples=samples)], TINY, ENOUGH, EXPECTED)
    assert [(row.what, row.size) for row in rows] == [
        ("decode step", "batch 1, C 64"),
        ("decode step, slowest of a period", "batch 1, C 64"),
        ("decode step", "batch 3, C 64"),
        ("decode step, slowest of a period", "batch 3, C 64"),
        ("prompt of 128 tokens", "C 64"),
        ("mixed step, 128 prompt tokens", "batch 2, C 64"),
    ]
    write_json(tmp_path / "bench.json", "a machine", rows)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["machine"] == "a machine"
    assert written["rows"][0]["stock"] == rows[0].stock
    assert len(table(rows).splitlines()) == len(written["rows"]) + 2


def test_a_budget_is_set_against_stock_over_as_many_slots() -> None:
    samples = [
        Sample("step", None, 64, 3, 0.010),
        Sample("slowest step", None, 64, 3, 0.012),
        Sample("step", None, 96, 3, 0.020),
        Sample("step", 64, 64, 3, 0.0102),
        Sample("slowest step", 64, 64, 3, 0.0105),
        Sample("step", 96, 96, 3, 0.021),
        Sample("prompt", None, 64, 0, 0.1),
        Sample("prompt", 64, 64, 0, 0.104),
        Sample("step", 64, 64, 1, 0.01),  # of which there is no stock
    ]
    assert [Sample.from_line(sample.to_line()) for sample in samples] == samples
    rows = all_rows([Outcome("", samples=samples)], TINY, ENOUGH, EXPECTED)
    found = [(row.value, row.expected, row.promise, row.verdict) for row in rows]
    assert found == [
        (pytest.approx(2.0), 5.5, 3.0, "kept"),
        (pytest.approx(5.0), 3.5, None, ""),  # against the mean of stock's steps
        (pytest.approx(5.0), 5.5, 3.0, "missed"),
        (pytest.approx(4.0), 4.0, 5.0, "kept"),
    ]


def test_a_period_of_steps_is_told_by_its_slowest() -> None:
    steps = Steps.of([1.0, 1.0, 5.0, 1.0] * 3 + [9.0, 1.0, 5.0, 1.0], every=4)
    assert steps.slowest == 5.0  # not the single slow step
    assert steps.mean == pytest.approx(40 / 16)
    with pytest.raises(ValueError, match="less than a period"):
        Steps.of([1.0] * 3, every=4)


def test_steps_on_a_gpu_are_whole_periods_of_ballots() -> None:
    for budget in ON_GPU.budgets:
        assert ON_GPU.every(budget) == 8
        assert ON_GPU.steps % ON_GPU.every(budget) == 0


def test_what_does_not_fit_or_breaks_has_a_line_that_says_so() -> None:
    # Parameters of Llama-3.1-8B, less those of its norms.
    assert ON_GPU.weight_bytes == 2 * (8_030_261_248 - 65 * 4096)
    assert ON_GPU.fitting(4096, 80 << 30) == (1, 8, 64)
    assert ON_GPU.fitting(4096, 40 << 30) == (1, 8)
    rows = all_rows([Outcome("4096", failure="no memory")], ON_GPU, 40 << 30, EXPECTED)
    assert [(row.size, row.note) for row in rows] == [
        ("batch 64, C 4,096", "not timed: takes 55 GiB"),
        ("", "FAILED: no memory"),
    ]
    assert "not timed" in table(rows)


def test_lines_between_processes_are_rows_and_samples() -> None:
    row = Row("`write`, in a CUDA graph", "batch 8", 4.4e-6, None, 3.3, 4.0)
    sample = Sample("step", None, 64, 3, 0.01)
    output = f"noise\n{ROW}{row.to_line()}\n{SAMPLE}{sample.to_line()}\n"
    outcome = Outcome.of("stock", output)
    assert (outcome.rows, outcome.samples) == ([row], [sample])
    assert row.value == pytest.approx(4.4)
    assert table([row]).splitlines()[-1] == (
        "| `write`, in a CUDA graph | batch 8 | 4.4 µs |  |  | 3.3 µs | ≤ 4.0 µs "
        "| missed |"
    )


def test_without_a_gpu_the_bench_is_refused_and_its_parts_break_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--bench", "--json", "x.json"])
    assert refused.value.code == 2
    assert "--bench: it times a GPU, and torch finds none here" in (
        capsys.readouterr().err
    )
    outcome = run_part("launches")
    assert not outcome.rows
    assert outcome.failure
