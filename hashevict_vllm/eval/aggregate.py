"""From samples to one figure per policy and budget; fixed before anything was run.

1. *Task, relative to the full cache* on the same samples: mean score over mean score.
   Perplexity tasks: exp(NLL of the full cache - NLL), which is the full cache's
   perplexity over the policy's, at positions from the budget on (over all tokens of
   all samples; a sample that ends before the budget counts for nothing).
2. A *weak* task is one on which the full cache itself scores under `WEAK` (20 %): its
   accuracy says nothing. It is figured by the gold answer's NLL, as above, where there
   is one, listed apart, and not part of 3 and 4.
3. *Family*: unweighted mean of its tasks that are not weak; a family with none of them
   is listed apart as well.
4. *Mean*: unweighted mean of the families, without the query-agnostic ones, which are
   listed beside it. A second figure, ``mean (all)``, takes the weak tasks in, by their
   NLL.

1 means as good as the full cache; values above 1 are kept. The intervals are 95 %
percentile bootstraps over samples, drawn for the policy and the full cache together
(the same questions), for every task on its own. Which tasks are weak is decided on all
samples, once per length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hashevict_vllm.eval.records import Record
from hashevict_vllm.eval.tasks.base import AGNOSTIC, Task

WEAK = 0.2
RESAMPLES = 2000
SERVED = "engine"
"""The way of records that do not say how they were made."""


Cell = dict[str, dict[tuple, Record]]
"""Records of one policy, budget and length, by task and by (seed, index)."""


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Line:
    """One policy at one budget and nominal length, relative to the full cache.

    Attributes:
        policy: Its label.
        budget: Tokens; None is the full cache.
        length: Nominal length.
        tasks: Per task.
        families: Per family, weak tasks left out.
        mean: Over the families; None if all tasks are weak, or some have no samples.
        mean_all: Over the families, weak tasks included by their NLL; None if some
            tasks have no samples.
        raw: Per task that has scores, their plain mean.
        nll: Per task that has a gold answer to force, its mean NLL.
        lengths: Per task with free answers, their mean length in tokens.

    """

    policy: str
    budget: int | None
    length: int
    tasks: dict[str, Figure]
    families: dict[str, Figure]
    mean: Figure | None
    mean_all: Figure | None
    raw: dict[str, float]
    nll: dict[str, float]
    lengths: dict[str, float]

    @property
    def share(self) -> float:
        """Budget as a share of the nominal length."""
        return 1.0 if self.budget is None else self.budget / self.length


def aggregate(
    records: Iterable[Record], tasks: dict[str, Task]
) -> tuple[list[Line], dict[int, list[str]]]:
    """Lines of the report, and the weak tasks by nominal length.

    Records must be of one model and dtype, and a label mean one policy (`latest`);
    several seeds are pooled. Offline records (`hashevict_vllm.eval.offline`) are set
    against the full cache run offline: other kernels round otherwise.
    """
    by_cell, full_of, weak = sort_out(records, tasks)
    order = sorted(by_cell, key=lambda k: (k[2], k[1] is not None, k[0], k[1] or 0))
    lines = [
        _line(key[:3], by_cell[key], full_of[key[2:]], weak[key[2]], tasks)
        for key in order
        if key[2:] in full_of
    ]
    return lines, weak


def sort_out(
    records: Iterable[Record], tasks: dict[str, Task]
) -> tuple[dict[tuple, Cell], dict[tuple, Cell], dict[int, list[str]]]:
    """Records by cell: (policy, budget, length, way); the full cache's; weak tasks.

    The full cache's are keyed by (length, way).
    """
    by_cell: dict[tuple, Cell] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        way = record.get("way", SERVED)
        cell = by_cell[record["policy"], record["budget"], record["length"], way]
        cell[record["task"]][record["seed"], record["index"]] = record
    full_of = {key[2:]: cell for key, cell in by_cell.items() if key[1] is None}
    # Whether a task is weak is asked of the engine where it has been run.
    by_way = sorted(full_of, key=lambda key: key[1] == SERVED)
    full = {length: full_of[length, way] for length, way in by_way}
    weak = {
        length: [
            name
            for name in tasks
            if name in cell
            and tasks[name].metric == "score"
            and np.mean([r["score"]["score"] for r in cell[name].values()]) < WEAK
        ]
        for length, cell in full.items()
    }
    return by_cell, full_of, weak


def _line(
    key: tuple, cell: Cell, full: Cell, weak: list[str], tasks: dict[str, Task]
) -> Line:
    label, budget, length = key
    pairs = pairs_of(cell, full, tasks, budget)
    drawn = relative_of(pairs, budget, weak, tasks)
    counts = {name: len(found) for name, found in pairs.items()}
    strong = families_of(drawn, counts, tasks, [n for n in drawn if n not in weak])
    every = families_of(drawn, counts, tasks, list(drawn))
    finished = all(name in drawn for name in tasks if name in full)
    return Line(
        label,
        budget,
        length,
        {name: figure_of(values, counts[name]) for name, values in drawn.items()},
        {family: figure_of(*value) for family, value in strong.items()},
        _mean(strong) if strong and finished else None,
        _mean(every) if finished else None,
        {
            name: float(np.mean([r["score"]["score"] for r, _ in found]))
            for name, found in pairs.items()
            if tasks[name].metric == "score"
        },
        {
            name: float(np.mean([_nll(record, budget) for record, _ in found]))
            for name, found in pairs.items()
            if "nll" in found[0][0]["score"]
        },
        {
            name: float(np.mean([record["answer_tokens"] for record, _ in found]))
            for name, found in pairs.items()
            if "answer_tokens" in found[0][0]
        },
    )


Pairs = dict[str, list[tuple[Record, Record]]]
"""By task, the policy's record and the full cache's of the same sample."""

Drawn = np.ndarray
"""A relative figure on all samples, then on `RESAMPLES` resamples of them."""


def pairs_of(
    cell: Cell, full: Cell, tasks: dict[str, Task], budget: int | None
) -> Pairs:
    """Pair a policy's records with the full cache's, where any token is counted."""
    pairs = {
        name: [(cell[name][i], full[name][i]) for i in sorted(cell[name]) if i in both]
        for name in tasks
        if (both := cell.get(name, {}).keys() & full.get(name, {}).keys())
    }
    counted = {
        name: [pair for pair in found if _tokens(pair[0], budget)]
        for name, found in pairs.items()
    }
    return {name: found for name, found in counted.items() if found}


def relative_of(
    pairs: Pairs, budget: int | None, weak: list[str], tasks: dict[str, Task]
) -> dict[str, Drawn]:
    """Figures by task; the same samples are drawn for the same numbers of them."""
    rng = np.random.default_rng(0)
    by_nll = {
        name
        for name, found in pairs.items()
        if tasks[name].metric != "score"
        or (name in weak and "nll" in found[0][0]["score"])
    }
    return {
        name: _drawn(found, budget, name in by_nll, rng)
        for name, found in pairs.items()
    }


def _drawn(
    pairs: list[tuple[Record, Record]],
    budget: int | None,
    by_nll: bool,
    rng: np.random.Generator,
) -> Drawn:
    """Relative figures of a task, from a policy's records and the full cache's."""
    n = len(pairs)
    picks = np.vstack([np.arange(n), rng.integers(n, size=(RESAMPLES, n))])
    if by_nll:
        values = np.array([[_nll(r, budget) for r in pair] for pair in pairs])
        tokens = np.array([_tokens(ours, budget) for ours, _ in pairs])
        ours, base = (values * tokens[:, None])[picks].sum(axis=1).T
        return np.exp((base - ours) / tokens[picks].sum(axis=1))
    values = np.array([[r["score"]["score"] for r in pair] for pair in pairs])
    ours, base = values[picks].mean(axis=1).T
    # A resample on which the full cache scores nothing has no ratio.
    return np.divide(ours, base, out=np.full_like(ours, np.nan), where=base > 0)


Families = dict[str, tuple[Drawn, int]]
"""Figures and numbers of samples."""


def families_of(
    drawn: dict[str, Drawn],
    counts: dict[str, int],
    tasks: dict[str, Task],
    names: list[str],
) -> Families:
    """Families of some tasks: unweighted means of their figures."""
    grouped: dict[str, list[str]] = defaultdict(list)
    for name in names:
        grouped[tasks[name].family].append(name)
    return {
        family: (
            np.mean([drawn[name] for name in members], axis=0),
            sum(counts[name] for name in members),
        )
        for family, members in grouped.items()
    }


def _counted(record: Record, budget: int | None) -> list[float]:
    """Log-probabilities at positions from the budget on."""
    return record["logprobs"][max(0, (budget or 0) - record["first_position"]) :]


def _tokens(record: Record, budget: int | None) -> int:
    """Weight of a sample: its tokens past the budget; 1 where the answer is one."""
    return len(_counted(record, budget)) if "logprobs" in record else 1


def _nll(record: Record, budget: int | None) -> float:
    """NLL per token of the gold answer, or at positions from the budget on."""
    if "logprobs" not in record:
        return record["score"]["nll"]
    counted = _counted(record, budget)
    return -sum(counted) / len(counted)


def aware(families: Families) -> Families:
    """The families of tasks that the cache knows while it is reduced."""
    return {f: each for f, each in families.items() if not f.endswith(AGNOSTIC)}


def _mean(families: Families) -> Figure | None:
    counted = aware(families)
    if not counted:
        return None
    values = np.mean([values for values, _ in counted.values()], axis=0)
    return figure_of(values, sum(n for _, n in counted.values()))


def figure_of(drawn: Drawn, n: int) -> Figure:
    """Value and interval."""
    low, high = np.nanpercentile(drawn[1:], [2.5, 97.5])
    return Figure(float(drawn[0]), float(low), float(high), n)
