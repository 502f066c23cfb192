"""The report: Markdown tables, and plots of quality against budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hashevict_vllm.eval.aggregate import WEAK, Figure, Line, aggregate
from hashevict_vllm.eval.compare import OURS, Difference, compare
from hashevict_vllm.eval.losses import Loss, losses
from hashevict_vllm.eval.records import Record, latest
from hashevict_vllm.eval.tasks.base import Task


def write_report(
    records: Sequence[Record], tasks: dict[str, Task], directory: Path, command: str
) -> Path:
    """Write ``report.md`` and its plots into `directory`; return the report's path."""
    directory.mkdir(parents=True, exist_ok=True)
    records = latest(records)
    lines, weak = aggregate(records, tasks)
    differences = compare(records, tasks)
    lost = losses(records, tasks)
    parts = [_head(records, command)]
    for length in sorted({line.length for line in lines}):
        here = [line for line in lines if line.length == length]
        plots = _plots(here, length, directory)
        parts += [_section(here, weak.get(length, []), tasks, length)]
        parts += _losses([loss for loss in lost if loss.length == length])
        parts += _differences([d for d in differences if d.length == length])
        parts += [f"![{path.stem}]({path.name})" for path in plots]
    path = directory / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _head(records: Sequence[Record], command: str) -> str:
    models = sorted({f"{r['model']} ({r['dtype']})" for r in records})
    seeds = sorted({r["seed"] for r in records})
    found = sorted({json.dumps(r["versions"], sort_keys=True) for r in records})
    policies = {r["policy"]: r["options"] for r in records}
    return "\n".join(
        [
            "# Quality under a KV budget",
            "",
            f"`{command}`",
            "",
            f"Model: {', '.join(models)}. Samples: {len(records)}; seeds: {seeds}.",
            f"Versions: {'; '.join(found)}.",
            "",
            "Figures are relative to the full cache on the same samples, in percent, "
            "with 95 % bootstrap intervals; definitions in "
            "`hashevict_vllm/eval/aggregate.py`. A budget is tokens per KV head, its "
            "share that of the nominal context length. No mean is given where tasks "
            "are not finished.",
            "",
            *(f"- `{label}`: `{json.dumps(o)}`" for label, o in policies.items()),
        ]
    )


def _section(
    lines: list[Line], weak: list[str], tasks: dict[str, Task], length: int
) -> str:
    families = list(dict.fromkeys(f for line in lines for f in line.families))
    names = [name for name in tasks if any(name in line.tasks for line in lines)]
    strong = [name for name in names if name not in weak]
    parts = [f"## {length} tokens", "### Mean over families"]
    rows = [
        [*_row_head(line), _show(line.mean)]
        + [_show(line.families.get(family)) for family in families]
        + [_show(line.mean_all)]
        for line in lines
    ]
    parts.append(_table([*_HEAD, "mean", *families, "mean (all)"], rows))
    parts.append("### Tasks")
    parts.append(
        _table(
            [*_HEAD, *strong],
            [[*_row_head(x), *(_show(x.tasks.get(n)) for n in strong)] for x in lines],
        )
    )
    if weak:
        parts.append(f"### Apart: the full cache scores under {WEAK:.0%}")
        parts.append("By the NLL of the gold answer: exp(full cache's - policy's).")
        rows = [[*_row_head(x), *(_show(x.tasks.get(n)) for n in weak)] for x in lines]
        parts.append(_table([*_HEAD, *weak], rows))
    parts.append("### Plain scores and NLL of the gold answer")
    parts.append(
        "`score / NLL, length of the answer`; NLL in nats per token, length in tokens."
    )
    rows = [[*_row_head(x), *(_plain(x, n, tasks[n]) for n in names)] for x in lines]
    parts.append(_table([*_HEAD, *names], rows))
    return "\n\n".join(parts)


def _differences(differences: list[Difference]) -> list[str]:
    """A table of what the default rule is ahead of the other policies."""
    if not differences:
        return []
    families = list(dict.fromkeys(f for d in differences for f in d.families))
    rows = [
        [d.policy, f"{d.budget} ({d.budget / d.length:.0%})", _show(d.mean)]
        + [_show(d.families.get(family)) for family in families]
        for d in differences
    ]
    return [
        f"### `{OURS}` less the others, in points",
        "On the samples that both have finished; intervals are of the difference.",
        _table([*_HEAD, "mean", *families], rows),
    ]


def _losses(lost: list[Loss]) -> list[str]:
    """Tables of own answers and prose, in nats per token past the budget."""
    parts = []
    for task in dict.fromkeys(loss.task for loss in lost):
        here = [loss for loss in lost if loss.task == task]
        noise = max((x.loss.value for x in here if not x.budget), default=None)
        rows = [
            [
                x.policy,
                str(x.budget or "full"),
                f"{x.loss.value:.4f} [{x.loss.low:.4f}, {x.loss.high:.4f}]",
                "–" if noise is None else f"{x.loss.value - noise:.4f}",
                _show(x.unlikely),
                str(x.tokens),
            ]
            for x in here
        ]
        parts.append(f"### `{task}`: loss in nats per token past the budget")
        head = [*_HEAD, "loss", "above noise", "unlikely, %", "tokens"]
        parts.append(_table(head, rows))
    return parts


_HEAD = ["policy", "budget"]


def _row_head(line: Line) -> list[str]:
    if not line.budget:
        return [line.policy, "full"]
    return [line.policy, f"{line.budget} ({line.share:.0%})"]


def _show(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    low, high = 100 * figure.low, 100 * figure.high
    return f"{100 * figure.value:.1f} [{low:.0f}, {high:.0f}] n={figure.n}"


def _plain(line: Line, name: str, task: Task) -> str:
    if name not in line.tasks:
        return "–"
    parts = [f"{line.raw[name]:.2f}"] if task.metric == "score" else []
    parts += [f"{line.nll[name]:.3f}"] if name in line.nll else []
    length = f", {line.lengths[name]:.0f}" if name in line.lengths else ""
    return " / ".join(parts) + length


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]
    )


def _plots(lines: list[Line], length: int, directory: Path) -> list[Path]:
    """One plot of the mean and one per family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    families = list(dict.fromkeys(f for line in lines for f in line.families))
    paths = []
    for what in ["mean", *families]:
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        _draw(axes, lines, what)
        axes.set(
            xlabel=f"budget, % of {length} tokens",
            ylabel="% of the full cache",
            title=what,
            xlim=(0, 103),
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        paths.append(directory / f"{what}-{length}.png")
        figure.savefig(paths[-1], dpi=120)
        pyplot.close(figure)
    return paths


def _draw(axes: Any, lines: list[Line], what: str) -> None:
    """One line per policy, which ends in the full cache at 100 %."""
    for policy in dict.fromkeys(line.policy for line in lines if line.budget):
        points = [
            (100 * line.share, figure)
            for line in lines
            if line.policy == policy
            and (figure := line.mean if what == "mean" else line.families.get(what))
        ]
        x = [share for share, _ in points]
        y = [100 * figure.value for _, figure in points]
        low = [max(0.0, 100 * (f.value - f.low)) for _, f in points]
        high = [max(0.0, 100 * (f.high - f.value)) for _, f in points]
        axes.errorbar(
            [*x, 100],
            [*y, 100],
            yerr=[[*low, 0], [*high, 0]],
            marker="o",
            markersize=3,
            capsize=2,
            label=policy,
        )
