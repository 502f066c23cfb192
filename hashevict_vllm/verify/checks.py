"""What was checked, what came of it, and the table that says so."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

PASSED, FAILED, UNCHECKED = "passed", "FAILED", "not checked"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        part: What it belongs to, such as ``kernels``.
        name: What was compared or timed.
        result: `PASSED`, `FAILED` or `UNCHECKED`.
        detail: Numbers, or the reason.

    """

    part: str
    name: str
    result: str
    detail: str

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Check:
        """Read `to_line`."""
        return cls(**json.loads(line))


def compared(part: str, name: str, right: bool, detail: str) -> Check:
    """A check that passed or failed."""
    return Check(part, name, PASSED if right else FAILED, detail)


def table(checks: Iterable[Check]) -> str:
    """The checks as a Markdown table."""
    lines = ["| part | check | result | detail |", "|---|---|---|---|"]
    lines += [f"| {c.part} | {c.name} | {c.result} | {c.detail} |" for c in checks]
    return "\n".join(lines)
