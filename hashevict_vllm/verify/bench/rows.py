"""One line of the bench: what was timed, what was expected, what is promised."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        what: What was timed.
        size: Batch, budget, tokens.
        seconds: How long it took; None if it was not timed.
        stock: The same of stock vLLM; None for what stock does not do.
        expected: By arithmetic for an H100: per cent more than stock or, without
            ``stock``, microseconds; None where there is no such arithmetic.
        promise: At most so much, in the same unit.
        note: Why it was not timed.

    """

    what: str
    size: str
    seconds: float | None = None
    stock: float | None = None
    expected: float | None = None
    promise: float | None = None
    note: str = ""

    @property
    def value(self) -> float | None:
        """Per cent more than stock; without ``stock`` microseconds."""
        if self.seconds is None:
            return None
        if self.stock is None:
            return self.seconds * 1e6
        return 100 * (self.seconds / self.stock - 1)

    @property
    def verdict(self) -> str:
        """``kept`` or ``missed``; nothing where nothing is promised or was timed."""
        if self.value is None or self.promise is None:
            return ""
        return "kept" if self.value <= self.promise else "missed"

    @property
    def unit(self) -> str:
        """Of ``value``, ``expected`` and ``promise``."""
        return "µs" if self.stock is None else "%"

    def as_dict(self) -> dict[str, object]:
        """For JSON: the fields, and what follows from them."""
        more = {"value": self.value, "unit": self.unit, "verdict": self.verdict}
        return asdict(self) | more

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Row:
        """Read `to_line`."""
        return cls(**json.loads(line))


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def _amount(value: float | None, row: Row, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign}.1f} {row.unit}"


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| what | size | time | stock | more than stock | expected on an H100 "
        "| promised | |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        more = _amount(row.value, row, "+") if row.stock is not None else ""
        promise = _amount(row.promise, row)
        cells = (
            *(row.what, row.size, _time(row.seconds), _time(row.stock), more),
            _amount(row.expected, row, "+" if row.stock is not None else ""),
            f"≤ {promise}" if promise else "",
            row.note or row.verdict,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
