"""Compiles the kernels without a GPU and reads what the machine code needs.

What is compiled is what `ops` launches: launches are recorded on small CPU tensors,
specialised by Triton as for a device (constants, ``== 1``, divisible by 16), and
compiled for a chosen architecture by the assemblers that Triton ships.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90, 100, 120)
"""A100, H100, B200 and consumer cards of the last."""

_WARP = 32
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel, its arguments by name, its options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name without its suffix; that of a plain copy says so."""
        name = self.kernel.__name__.removesuffix("_kernel")
        return name if self.arguments.get("SCANS", True) else f"{name}, no scan"

    def runs_on(self, architecture: int) -> bool:
        """Whether Triton compiles it: there is no e4m3 before sm_89, as in vLLM."""
        dtypes = {getattr(x, "dtype", None) for x in _flat(self.arguments.values())}
        return architecture >= 89 or torch.float8_e4m3fn not in dtypes


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Arguments, those of named tuples one by one."""
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        else:
            yield value


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs.

    Attributes:
        registers: Of a thread.
        stack: Bytes of a thread in local memory: spills and arrays.
        local: Bytes of a thread in local memory, allocated statically.
        shared: Bytes of a program in shared memory, as launched.
        threads: Of a program.
        ptx: The assembly before the last step.
        cubin: The machine code.

    """

    registers: int
    stack: int
    local: int
    shared: int
    threads: int
    ptx: str
    cubin: bytes


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within this context kernels are noted instead of launched."""
    launches: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = self.arg_names
        options = {k: v for k, v in kwargs.items() if k not in names}
        named = {k: v for k, v in kwargs.items() if k in names}
        arguments = {**dict(zip(names, args, strict=False)), **named}
        launches.append(Launch(self, arguments, options))

    with mock.patch.object(JITFunction, "run", note):
        yield launches


class _Driver:
    """Stands for a device, so that Triton specialises arguments as it would there."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, _WARP)

    def get_current_device(self) -> int:
        return self.architecture  # what is compiled is kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def variant(launch: Launch) -> str:
    """What Triton compiles a kernel anew for: types, constants, alignments, options."""
    with mock.patch.object(triton.runtime.driver, "_active", _Driver(90)):
        *_, binder = launch.kernel.device_caches[90]
        _, special, options = binder(**launch.arguments, **launch.options)
    return f"{launch.name}: {special}, {options}"


def compile_launch(launch: Launch, architecture: int) -> Resources:
    """Compile one launch to machine code.

    Args:
        launch: From `recorded_launches`.
        architecture: One of `ARCHITECTURES`.

    Raises:
        RuntimeError: If the report on the machine code cannot be read.

    """
    driver = _Driver(architecture)
    with mock.patch.object(triton.runtime.driver, "_active", driver):
        compiled = launch.kernel.warmup(**launch.arguments, **launch.options, grid=(1,))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        report = subprocess.run(
            [tool, "-res-usage", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    found = _USAGE.search(report)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resource usage: {report!r}")
    registers, stack, _, local = map(int, found.groups())
    return Resources(
        registers=registers,
        stack=stack,
        local=local,
        shared=compiled.metadata.shared,
        threads=compiled.metadata.num_warps * _WARP,
        ptx=compiled.asm["ptx"],
        cubin=compiled.asm["cubin"],
    )
