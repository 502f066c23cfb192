"""Where figures go: JSON that is complete after every row, a log, plots."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

Lines = dict[str, list[tuple[float, dict[str, float]]]]
"""Of a plot: by name, points of x and a `timing.Spread` as a dict."""


def show_progress(cells: Sequence[T], what: str) -> Iterator[T]:
    """Yield the cells with a progress bar."""
    from tqdm import tqdm

    yield from tqdm(cells, desc=what, unit="cell", mininterval=1, dynamic_ncols=True)


class Results:
    """One run's figures.

    Attributes:
        rows: One dict per cell of the grid.

    """

    def __init__(self, directory: Path, name: str, arguments: Sequence[str]) -> None:
        """Begin a run.

        Args:
            directory: Folder for JSON and plots; made if missing.
            name: Of the subcommand; files are called after it.
            arguments: The command line, for the record.

        """
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.path = directory, directory / f"{name}.json"
        self.rows: list[dict[str, Any]] = []
        self._head: dict[str, Any] = {
            "command": " ".join(["scripts/bench", *arguments]),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "machine": machine(),
        }

    def note(self, key: str, value: Any) -> None:
        """Record something of the whole run."""
        self._head[key] = value
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        """Record a row."""
        self.rows.append(row)
        self._write()

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        from tqdm import tqdm

        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def plot(
        self, name: str, lines: Lines, xlabel: str, ylabel: str, log: bool = False
    ) -> Path:
        """Draw lines of medians with their quartiles; ``log`` in both directions."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        for label, points in lines.items():
            points = sorted(points, key=lambda point: point[0])
            spreads = [spread for _, spread in points]
            axes.errorbar(
                [x for x, _ in points],
                [s["median"] for s in spreads],
                yerr=[
                    [s["median"] - s["low"] for s in spreads],
                    [s["high"] - s["median"] for s in spreads],
                ],
                marker="o",
                markersize=3,
                capsize=2,
                label=label,
            )
        if log:
            axes.set(xscale="log", yscale="log")
        axes.set(xlabel=xlabel, ylabel=ylabel, title=name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        path = self.directory / f"{name}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        return path

    def _write(self) -> None:
        """Replace the file in one go: an interrupted run leaves whole JSON."""
        text = json.dumps({**self._head, "rows": self.rows}, indent=1)
        partial = self.path.with_suffix(".partial")
        partial.write_text(text + "\n")
        partial.replace(self.path)


def machine() -> dict[str, Any]:
    """What figures depend on beside the code."""
    return {
        "cpu": _cpu_model(),
        "cores": sorted(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": dict(_versions(("vllm", "torch", "numba", "hashevict-vllm"))),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def _versions(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
