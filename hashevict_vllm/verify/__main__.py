"""``hashevict-vllm verify``: is everything right on this machine, and how fast?

On a GPU: its kernels against the reference, vLLM with and without a policy, kernels
timed against their byte floor. Without one: the kernels of CPUs in vLLM, the GPU's in
Triton's interpreter, and a list of what could not be checked. Prints a table to be
pasted into an issue; the exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from hashevict_vllm.verify.checks import FAILED, UNCHECKED, Check, table
from hashevict_vllm.verify.part import MARK, PARTS

ON_GPU = ("gpu-kernels", "gpu-engine", "gpu-time")
WITHOUT_GPU = ("interpreted-kernels", "cpu-engine")

NEEDS_GPU = (
    Check("kernels", "compiled, on a GPU", UNCHECKED, "no GPU; interpreted instead"),
    Check("engine", "CUDA graphs, fp8 caches", UNCHECKED, "no GPU"),
    Check("engine", "FLASH_ATTN, FLASHINFER, xformers", UNCHECKED, "no GPU"),
    Check("time", "kernels against their floor", UNCHECKED, "no GPU"),
)
NOT_IN_IT = (
    Check("engine", "fp8 caches", UNCHECKED, "not part of this command"),
    Check("engine", "other backends", UNCHECKED, "not what vLLM chooses here"),
)

BENCH_WITHOUT_GPU = (
    "--bench: it times a GPU, and torch finds none here; run it on a GPU node, or "
    "`hashevict-vllm verify` without it."
)


def machine() -> str:
    """The versions and the device, in one line."""
    import torch

    device = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    versions = [
        f"{name} {metadata.version(name)}"
        for name in ("hashevict-vllm", "vllm", "torch", "triton")
        if _is_installed(name)
    ]
    return ", ".join([device, *versions, f"Python {platform.python_version()}"])


def _is_installed(name: str) -> bool:
    return bool(list(metadata.distributions(name=name)))


def run_part(name: str) -> list[Check]:
    """The checks of one part; a part that breaks is one that failed."""
    print(f"hashevict-vllm: {name} ...", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "hashevict_vllm.verify.part", name],
        capture_output=True,
        text=True,
        env=os.environ.copy(),
        check=False,
    )
    checks = [
        Check.from_line(line.removeprefix(MARK))
        for line in done.stdout.splitlines()
        if line.startswith(MARK)
    ]
    if done.returncode:
        sys.stderr.write(done.stdout[-2000:] + done.stderr[-8000:])
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        checks.append(Check(name, "runs to its end", FAILED, last.replace("|", "/")))
    return checks


def bench(file: Path | None) -> bool:
    """Print the table of all timings, and write it; whether a part broke."""
    from hashevict_vllm.verify.bench import rows, run, sizes

    outcomes = [run.run_part(name) for name in sizes.ON_GPU.parts]
    found = run.all_rows(outcomes, sizes.ON_GPU, sizes.device_bytes())
    print(f"{machine()}\n\n{rows.table(found)}")
    if file is not None:
        run.write_json(file, machine(), found)
    return any(outcome.failure for outcome in outcomes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that this machine can, and print the table."""
    import torch

    parser = argparse.ArgumentParser(
        prog="hashevict-vllm verify", description=__doc__.partition("\n\n")[2]
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=sorted(PARTS),
        metavar="PART",
        help=", ".join(PARTS),
    )
    parser.add_argument(
        "--bench",
        action="store_true",
        help="time what a budget costs on this GPU, against stock vLLM, and check "
        "nothing (about 15 minutes)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="with --bench: write the table there"
    )
    on_gpu = torch.cuda.is_available()
    options = parser.parse_args(arguments)
    if options.json and not options.bench:
        parser.error("--json: only --bench has figures to write; add --bench.")
    if options.bench:
        if not on_gpu:
            parser.error(BENCH_WITHOUT_GPU)
        sys.exit(bench(options.json))
    names = options.only or (ON_GPU if on_gpu else WITHOUT_GPU)
    checks = []
    for name in names:
        if name == "cpu-engine" or _is_installed("triton"):
            checks += run_part(name)
        else:
            checks.append(Check(name, "all", UNCHECKED, "triton is not installed"))
    checks += NOT_IN_IT if on_gpu else NEEDS_GPU
    print(f"{machine()}\n\n{table(checks)}")
    sys.exit(any(check.result == FAILED for check in checks))


if __name__ == "__main__":
    main()
