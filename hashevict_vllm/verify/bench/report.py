"""From what engines took to rows: stock beside a budget, arithmetic beside both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from hashevict_vllm.kernels.triton import cost
from hashevict_vllm.verify.bench.rows import Row

WHOLE_STEP, PROMPT_END = 3.0, 5.0
"""Promised: per cent of a decode step, and of reading a segment."""


@dataclass(frozen=True)
class Sample:
    """What one engine took.

    Attributes:
        what: ``step``, ``slowest step`` or ``prompt``.
        budget: C of the engine; None for stock.
        slots: That every decoding request attends to.
        batch: Requests that decode.
        seconds: How long.

    """

    what: str
    budget: int | None
    slots: int
    batch: int
    seconds: float

    def to_line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> Sample:
        """Read `to_line`."""
        return cls(**json.loads(line))


def engine_rows(
    samples: Iterable[Sample],
    prompt: int,
    expectation: cost.Expectation = cost.ON_H100,
) -> Iterator[Row]:
    """A row for every sample of a budget of which there is a stock one.

    Args:
        samples: Of all engines.
        prompt: Tokens of a prompt.
        expectation: What figures are set against.

    """
    samples = list(samples)
    stock = {(s.what, s.slots, s.batch): s.seconds for s in samples if s.budget is None}
    # The slowest of a period's steps is none that stock votes in.
    for key in [key for key in stock if key[0] == "slowest step"]:
        stock[key] = stock["step", key[1], key[2]]
    for sample in samples:
        base = stock.get((sample.what, sample.slots, sample.batch))
        if sample.budget is None or base is None:
            continue
        what, size, expected, promise = _described(sample, prompt, expectation)
        yield Row(what, size, sample.seconds, base, expected, promise)


def _described(
    sample: Sample, prompt: int, expectation: cost.Expectation
) -> tuple[str, str, float | None, float | None]:
    """What and size of a row, per cent that are expected and that are promised."""
    size = f"batch {sample.batch}, C {sample.slots:,}"
    if sample.what == "prompt":
        if sample.batch:
            return f"mixed step, {prompt:,} prompt tokens", size, None, PROMPT_END
        what = f"prompt of {prompt:,} tokens"
        return what, f"C {sample.slots:,}", expectation.prompt_percent(), PROMPT_END
    layer = expectation.layer(sample.batch, sample.slots)
    if sample.what == "slowest step":
        return "decode step, slowest of a period", size, layer.voting, None
    return "decode step", size, layer.mean, WHOLE_STEP
