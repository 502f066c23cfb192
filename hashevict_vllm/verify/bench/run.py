"""All parts of the bench, one process after the other, and what came of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hashevict_vllm.kernels.triton.cost import ON_H100, Expectation
from hashevict_vllm.verify.bench.report import Sample, engine_rows
from hashevict_vllm.verify.bench.rows import Row
from hashevict_vllm.verify.bench.sizes import Sizes

ROW, SAMPLE = "hashevict-bench-row: ", "hashevict-bench-sample: "
"""Before the lines of JSON that a part prints."""

QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""A part's environment: the engine runs in its process, whose steps are timed."""


@dataclass(frozen=True)
class Outcome:
    """What one part printed.

    Attributes:
        name: Of the part.
        rows: Of launches.
        samples: Of an engine.
        failure: The last line of its complaint, if it broke.

    """

    name: str
    rows: list[Row] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    failure: str = ""

    @classmethod
    def of(cls, name: str, output: str, failure: str = "") -> Outcome:
        """Read a part's standard output."""
        lines = output.splitlines()
        return cls(
            name,
            [Row.from_line(x) for x in _after(ROW, lines)],
            [Sample.from_line(x) for x in _after(SAMPLE, lines)],
            failure.replace("|", "/"),
        )


def _after(mark: str, lines: Iterable[str]) -> Iterator[str]:
    return (line.removeprefix(mark) for line in lines if line.startswith(mark))


def run_part(name: str) -> Outcome:
    """Run one part in a process of its own; it takes the others along in nothing."""
    print(f"hashevict-vllm: bench, {name} ...", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "hashevict_vllm.verify.bench.part", name],
        capture_output=True,
        text=True,
        env={**os.environ, **QUIET},
        check=False,
    )
    failure = ""
    if done.returncode:
        sys.stderr.write(done.stdout[-2000:] + done.stderr[-8000:])
        failure = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Outcome.of(name, done.stdout, failure)


def all_rows(
    outcomes: Iterable[Outcome],
    sizes: Sizes,
    free: int,
    expectation: Expectation = ON_H100,
) -> list[Row]:
    """Launches, then engines, then what broke or did not fit.

    Args:
        outcomes: Of all parts.
        sizes: What was to be timed.
        free: Bytes of the device.
        expectation: What figures are set against.

    """
    outcomes = list(outcomes)
    rows = [row for outcome in outcomes for row in outcome.rows]
    samples = [sample for outcome in outcomes for sample in outcome.samples]
    rows += engine_rows(samples, sizes.prompt, expectation)
    for budget in sizes.budgets:
        fits = sizes.fitting(budget, free)
        for batch in (b for b in sizes.batches if b not in fits):
            needed = sizes.needed_bytes(batch, budget + sizes.decode_tokens) / 2**30
            note = f"not timed: takes {needed:.0f} GiB"
            rows.append(Row("decode step", f"batch {batch}, C {budget:,}", note=note))
    broken = [outcome for outcome in outcomes if outcome.failure]
    rows += [Row(f"part {x.name}", "", note=f"FAILED: {x.failure}") for x in broken]
    return rows


def write_json(path: Path, machine: str, rows: Iterable[Row]) -> None:
    """The table as JSON: ``{"machine": .., "rows": [..]}``, times in seconds."""
    found = {"machine": machine, "rows": [row.as_dict() for row in rows]}
    path.write_text(json.dumps(found, indent=1) + "\n")
