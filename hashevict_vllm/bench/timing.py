"""Interleaved timing: everything that is compared runs in turn, in one process.

A busy machine slows all parts alike for a while; taking turns makes that cancel in
ratios, and medians with quartiles say how much did not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Part = Callable[[int], None]
"""One of the things compared; called with the index of the step within a repeat."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample.

    Attributes:
        median: In the unit of the sample: seconds, or none for a ratio.
        low: Lower quartile.
        high: Upper quartile.
        n: Size of the sample.

    """

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        """Summarise a sample.

        Raises:
            ValueError: If it is empty.

        """
        if not sample:
            raise ValueError("an empty sample has no median")
        if len(sample) == 1:
            return cls(sample[0], sample[0], sample[0], 1)
        low, median, high = statistics.quantiles(sample, n=4, method="inclusive")
        return cls(median, low, high, len(sample))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Spread:
        """The inverse of `as_dict`."""
        return cls(**fields)

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)

    def show(self, factor: float = 1.0, digits: int = 2) -> str:
        """``median [low, high]``, each times ``factor``."""
        values = (self.median, self.low, self.high)
        median, low, high = (f"{factor * x:.{digits}f}" for x in values)
        return f"{median} [{low}, {high}]"


def interleaved(
    parts: Mapping[str, Part], repeats: int, steps: int = 1, warm_up: int = 1
) -> dict[str, list[float]]:
    """Time parts in turn: every part at step 0, every part at step 1, and so on.

    Args:
        parts: What is compared, by name; run in this order within a step.
        repeats: Samples of each.
        steps: Steps of a repeat; a sample is the mean over them. For work that is
            only done now and then, one period of it.
        warm_up: Repeats before the first that counts.

    Returns:
        Seconds per step, one number per repeat, by name. Samples of equal index were
        taken together, so that their ratio is one of paired measurements.

    """
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(-warm_up, repeats):
        totals = dict.fromkeys(parts, 0.0)
        for step in range(steps):
            for name, part in parts.items():
                start = time.perf_counter()
                part(step)
                totals[name] += time.perf_counter() - start
        if repeat >= 0:
            for name, total in totals.items():
                seconds[name].append(total / steps)
    return seconds


def show(fields: dict[str, Any], factor: float = 1.0) -> str:
    """`Spread.show` of a spread's dict."""
    return Spread.from_dict(fields).show(factor)


def total(*samples: Sequence[float]) -> list[float]:
    """Sums of paired samples: the time of parts that follow each other."""
    return [sum(values) for values in zip(*samples, strict=True)]


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of the ratios of paired samples."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def read_bandwidth(mib: int = 256, repeats: int = 9) -> Spread:
    """Bytes per second that torch's threads read from memory, by summing an array.

    Args:
        mib: Size of the array; well beyond the caches.
        repeats: Samples.

    """
    import torch

    x = torch.ones(mib << 18, dtype=torch.float32)

    def read(step: int) -> None:
        x.sum()

    samples = interleaved({"sum": read}, repeats)["sum"]
    return Spread.of([x.nbytes / second for second in samples])
