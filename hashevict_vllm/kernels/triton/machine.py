"""What the machine code of a compiled kernel does on its longest path.

Read from the disassembly: how often an instruction runs follows from the loops around
it, and how many loads of global memory wait for each other from which registers are
written and read. Branches that are not loops are taken to fall through, so that the
path is one that does everything.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

_LINE = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?U?P\w+\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_.]*)\s*(?P<operands>[^;]*);"
)
_REGISTER = re.compile(r"\b(U?[RP])(\d+)(\.64)?\b")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_WIDE = {".128": 4, ".64": 2}
_NO_RESULT = ("ST", "BRA", "BAR", "EXIT", "RED", "WARPSYNC", "BSYNC", "BSSY", "NOP")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a disassembly."""

    address: int
    predicate: str
    opcode: str
    operands: str

    def registers(self) -> tuple[list[str], list[str]]:
        """Those that it writes, and those that it reads; predicates are such, too."""
        found = [
            (m.start(), m[1], int(m[2]), 2 if m[3] else 1)
            for m in _REGISTER.finditer(self.operands)
        ]
        leading = 0
        if not self.opcode.startswith(_NO_RESULT):
            # A register and a carry, or the other way round; comparisons write one.
            kinds = [kind[-1] for _, kind, _, _ in found[:2]]
            both = len({*kinds}) == 2 and "SETP" not in self.opcode
            leading = min(2 if both and "P" in kinds else 1, len(found))
        wide = next((n for part, n in _WIDE.items() if part in self.opcode), 1)
        named = []
        for at, (_, kind, number, count) in enumerate(found):
            size = max(count, wide if at < leading else 1)
            named.append([f"{kind}{number + i}" for i in range(size)])
        results = [name for names in named[:leading] for name in names]
        sources = [name for names in named[leading:] for name in names]
        guards = [f"{m[1]}{m[2]}" for m in _REGISTER.finditer(self.predicate)]
        return results, sources + guards

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = _TARGET.search(self.operands.strip())
        return int(found[1], 16) if self.opcode == "BRA" and found else None


@dataclass(frozen=True)
class MachineCode:
    """A kernel's instructions.

    Attributes:
        instructions: In order of their addresses.

    """

    instructions: tuple[Instruction, ...]

    @classmethod
    def of(cls, cubin: bytes) -> MachineCode:
        """Disassemble, with the tool that Triton ships.

        Raises:
            RuntimeError: If there is nothing to be read.

        """
        tool = (
            Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            text = subprocess.run(
                [tool, "-sass", file.name], check=True, capture_output=True, text=True
            ).stdout
        read = tuple(
            Instruction(
                int(m["address"], 16), m["predicate"] or "", m["opcode"], m["operands"]
            )
            for m in _LINE.finditer(text)
        )
        if not read:
            raise RuntimeError(f"cuobjdump showed no instructions: {text[:200]!r}")
        return cls(read)

    @property
    def loops(self) -> list[tuple[int, int]]:
        """First and last address of every loop, outer ones first."""
        backward = {
            (i.target, i.address)
            for i in self.instructions
            if i.target is not None and i.target < i.address
        }
        return sorted(backward, key=lambda span: (span[0], -span[1]))

    def executed(self, trips: Sequence[int]) -> int:
        """Instructions that a warp executes.

        Args:
            trips: How often each of `loops` runs.

        Raises:
            ValueError: If there are more or fewer loops.

        """
        loops = self.loops
        if len(trips) != len(loops):
            raise ValueError(f"{len(loops)} loops, and trips for {len(trips)}.")
        total = 0
        for instruction in self.instructions:
            times = 1
            for (first, last), trip in zip(loops, trips, strict=True):
                if first <= instruction.address <= last:
                    times *= trip
            total += times
        return total

    @property
    def loads_in_turn(self) -> int:
        """Most loads of global memory of which each waits for the one before.

        Those of a loop count once: its rounds do not wait for each other's loads. What
        a kernel stores in global memory and loads again is not followed.
        """
        depth: dict[str, int] = {}
        stored = deepest = 0
        for instruction in self.instructions:
            opcode = instruction.opcode
            results, sources = instruction.registers()
            here = max((depth.get(register, 0) for register in sources), default=0)
            if opcode.startswith("LDG"):
                here += 1
            elif opcode.startswith("LDS"):
                here = max(here, stored)
            elif opcode.startswith("STS"):
                stored = max(stored, here)
            for register in results:
                depth[register] = here
            deepest = max(deepest, here)
        return deepest
