"""One part of the bench, in a process of its own: ``python -m`` and what it times.

``launches``, ``stock``, or a budget. Rows and samples go to standard output, a line of
JSON each after `ROW` or `SAMPLE`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hashevict_vllm.kernels import codes
from hashevict_vllm.verify.bench.engine import running, write_model
from hashevict_vllm.verify.bench.launches import time_launches
from hashevict_vllm.verify.bench.report import Sample
from hashevict_vllm.verify.bench.run import QUIET, ROW, SAMPLE
from hashevict_vllm.verify.bench.sizes import (
    LAUNCHES,
    ON_GPU,
    STOCK,
    Sizes,
    device_bytes,
)


def engine_samples(sizes: Sizes, budget: int | None, free: int) -> Iterator[Sample]:
    """What one engine takes.

    Args:
        sizes: What is timed.
        budget: C; None for stock.
        free: Bytes of the device.

    """
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), sizes)
        pool = sizes.engine_pool(free)
        with running(Path(folder), sizes, budget, pool) as bench:
            for slots in sizes.budgets if budget is None else (budget,):
                for batch in sizes.fitting(slots, free):
                    steps = bench.decode(batch, slots)
                    yield Sample("step", budget, slots, batch, steps.mean)
                    yield Sample("slowest step", budget, slots, batch, steps.slowest)
            if budget in (None, sizes.budgets[0]):
                for beside in (0, sizes.beside):
                    seconds = bench.read_prompts(beside)
                    yield Sample("prompt", budget, sizes.budgets[0], beside, seconds)


def main() -> None:
    """Run the part that the first argument names, on the GPU."""
    os.environ.update(QUIET)
    name = sys.argv[1]
    if name == LAUNCHES:
        from hashevict_vllm.kernels.triton.shapes import Shape
        from hashevict_vllm.verify.timing import microseconds

        shape = dataclasses.replace(Shape(), kind=codes.VOTE)
        grid = (ON_GPU.batches, ON_GPU.budgets, ON_GPU.segment)
        for row in time_launches(shape, *grid, microseconds):
            print(f"\n{ROW}{row.to_line()}", flush=True)
        return
    budget = None if name == STOCK else int(name)
    for sample in engine_samples(ON_GPU, budget, device_bytes()):
        print(f"\n{SAMPLE}{sample.to_line()}", flush=True)


if __name__ == "__main__":
    main()
