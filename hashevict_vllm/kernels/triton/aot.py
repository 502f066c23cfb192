"""Compiles the kernels without a GPU and reads what the machine code needs.

What is compiled is what the operators launch: their launches are recorded on small CPU
tensors, with the same specialisation as Triton's own (constants, ``== 1``, divisible by
16), and compiled for a chosen architecture by the assemblers that Triton ships.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90, 100)
"""A100, H100 and B200."""

_WARP = 32
_ALIGNED = [["tt.divisibility", 16]]
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.uint8: "u8",
}


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
        dtypes = [getattr(value, "dtype", None) for value in self.arguments.values()]
        return architecture >= 89 or torch.float8_e4m3fn not in dtypes


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

    """

    registers: int
    stack: int
    local: int
    shared: int
    threads: int
    ptx: str


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


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict]:
    """Signature, constants and alignments of a launch, as Triton derives them."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int], list] = {}
    for index, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        special = not param.do_not_specialize
        one = special and isinstance(value, int) and value == 1
        if param.is_constexpr or value is None or one:
            types[param.name] = "constexpr"
            constants[param.name] = value
        elif isinstance(value, torch.Tensor):
            types[param.name] = "*" + _NAMES[value.dtype]
            if value.data_ptr() % 16 == 0:
                aligned[(index,)] = _ALIGNED
        elif isinstance(value, float):
            types[param.name] = "fp32"
        else:
            types[param.name] = "i32" if abs(value) < 2**31 else "i64"
            if special and value % 16 == 0:
                aligned[(index,)] = _ALIGNED
    return types, constants, aligned


def compile_launch(launch: Launch, architecture: int) -> Resources:
    """Compile one launch to machine code.

    Args:
        launch: From `recorded_launches`.
        architecture: One of `ARCHITECTURES`.

    Raises:
        RuntimeError: If the report on the machine code cannot be read.

    """
    types, constants, aligned = _specialise(launch)
    compiled = triton.compile(
        ASTSource(launch.kernel, types, constants, aligned),
        target=GPUTarget("cuda", architecture, _WARP),
        options=launch.options,
    )
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
    )
