"""One part of the verification, in a process of its own (``python -m``).

A part may need its own Triton, its own vLLM or its own environment, and must not take
the others along when it breaks. Its checks go to standard output, a line of JSON each
after `MARK`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

from hashevict_vllm.verify.checks import Check

MARK = "hashevict-verify: "


def interpreted_kernels() -> Iterator[Check]:
    """Triton's kernels, interpreted on the CPU."""
    from hashevict_vllm.verify.interpreter import allow_triton

    allow_triton()
    import torch

    from hashevict_vllm.verify import kernels

    torch.set_num_threads(1)
    yield from kernels.run("cpu")


def gpu_kernels() -> Iterator[Check]:
    """Triton's kernels on the GPU."""
    from hashevict_vllm.verify import kernels

    yield from kernels.run("cuda")


def cpu_engine() -> Iterator[Check]:
    """The served engine with numba's kernels."""
    from hashevict_vllm.verify import served

    yield from served.run_on_cpu()


def gpu_engine() -> Iterator[Check]:
    """Triton's kernels in the served engine."""
    from hashevict_vllm.verify import served

    yield from served.run_on_gpu()


def gpu_time() -> Iterator[Check]:
    """Triton's kernels against their byte floor."""
    from hashevict_vllm.verify import timing

    yield from timing.run()


PARTS: dict[str, Callable[[], Iterator[Check]]] = {
    "interpreted-kernels": interpreted_kernels,
    "gpu-kernels": gpu_kernels,
    "cpu-engine": cpu_engine,
    "gpu-engine": gpu_engine,
    "gpu-time": gpu_time,
}
"""By the name on the command line."""


def environment(part: str) -> dict[str, str]:
    """Variables that a part needs before anything is imported."""
    quiet = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    interpreted = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return {**quiet, **(interpreted if part.startswith("interpreted") else {})}


def main() -> None:
    """Run the part that the first argument names."""
    part = sys.argv[1]
    os.environ.update(environment(part))
    for check in PARTS[part]():
        print(f"\n{MARK}{check.to_line()}", flush=True)


if __name__ == "__main__":
    main()
