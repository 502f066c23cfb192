"""Tables and plots of `fidelity`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hashevict_vllm.eval.offline.fidelity import MEASURES, STEPS, TOP

Seeded = dict[int, np.ndarray]
"""By projection seed: [samples, measures, L, Hq]."""


def write_fidelity(
    records: Sequence[dict[str, Any]], directory: Path, command: str
) -> Path:
    """Write ``fidelity.md`` and its plots into `directory`; return its path."""
    by_cell: dict[tuple[int, str], dict[int, list]] = {}
    for record in records:
        cell = by_cell.setdefault((record["budget"], record["rule"]), defaultdict(list))
        seed = record["options"].get("policy", {}).get("seed", 0)
        cell[seed].append([record[name] for name in MEASURES])
    cells = {
        key: {seed: np.array(values) for seed, values in cell.items()}
        for key, cell in by_cell.items()
    }
    samples = {(r["task"], r["sample_seed"], r["index"]) for r in records}
    tasks = sorted({r["task"] for r in records})
    parts = [
        "# Attention fidelity",
        f"`{command}`",
        f"{len(samples)} samples of {', '.join(tasks)}; the first {STEPS} positions "
        "after the prompt at most. Every layer on its own, with exact inputs. *error*: "
        "relative L2 error of the attention output; *mass*: exact attention on live "
        f"slots; *top {TOP}*: the same of the {TOP} most attended positions. Means "
        "over layers, query heads, positions and samples; ± is the standard deviation "
        "over seeds of the projection.",
    ]
    for budget in sorted({budget for budget, _ in cells}):
        here = {rule: cell for (b, rule), cell in cells.items() if b == budget}
        parts += [f"## {budget} tokens", _means(here), _layers(here)]
        path = _plot(here, budget, directory)
        parts.append(f"![{path.stem}]({path.name})")
    path = directory / "fidelity.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _means(cells: dict[str, Seeded]) -> str:
    rows = []
    for rule, cell in cells.items():
        # [seeds, measures]
        figures = np.array([values.mean(axis=(0, 2, 3)) for values in cell.values()])
        shown = [
            f"{mean:.3f} ± {spread:.3f}" if len(cell) > 1 else f"{mean:.3f}"
            for mean, spread in zip(
                figures.mean(0), figures.std(0, ddof=len(cell) > 1), strict=True
            )
        ]
        heads = _of_seeds(cell).mean(1)[0].flatten()
        shown.append(f"{np.percentile(heads, 90):.3f}")
        rows.append([rule, *shown, str(len(cell)), str(len(next(iter(cell.values()))))])
    head = ["rule", "error", "mass", f"top {TOP}", "error, 90th percentile of heads"]
    return _table([*head, "projections", "samples"], rows)


def _of_seeds(cell: Seeded) -> np.ndarray:
    """Means over seeds; [measures, samples, L, Hq]."""
    return np.mean([values.swapaxes(0, 1) for values in cell.values()], axis=0)


def _layers(cells: dict[str, Seeded]) -> str:
    """Error by layer: mean over heads and samples."""
    by_rule = {r: _of_seeds(cell)[0].mean(axis=(0, 2)) for r, cell in cells.items()}
    count = len(next(iter(by_rule.values())))
    rows = [
        [rule, *(f"{value:.2f}" for value in values)]
        for rule, values in by_rule.items()
    ]
    return "Error by layer:\n\n" + _table(["rule", *map(str, range(count))], rows)


def _plot(cells: dict[str, Seeded], budget: int, directory: Path) -> Path:
    """Error and kept mass by layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, measure in zip(both, (0, 1), strict=True):
        for number, (rule, cell) in enumerate(cells.items()):
            values = _of_seeds(cell)[measure].mean(axis=(0, 2))
            style = "-" if number < 10 else "--"
            axes.plot(values, style, label=rule, linewidth=1.2)
        axes.set(xlabel="layer", ylabel=MEASURES[measure], title=f"{budget} tokens")
        axes.grid(alpha=0.3)
    both[1].legend(fontsize="x-small", bbox_to_anchor=(1, 1), loc="upper left")
    path = directory / f"fidelity-{budget}.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]
    )
