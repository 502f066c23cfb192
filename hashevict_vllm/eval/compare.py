"""The default rule against every other policy, sample by sample.

Two policies that are judged on the same questions err together, so that their
difference is known better than either figure: it is drawn for both at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hashevict_vllm.eval.aggregate import (
    SERVED,
    Cell,
    Drawn,
    Figure,
    aware,
    families_of,
    figure_of,
    pairs_of,
    relative_of,
    sort_out,
)
from hashevict_vllm.eval.records import Record
from hashevict_vllm.eval.tasks.base import Task

OURS = "hashevict"
"""Label of the default rule."""


@dataclass(frozen=True)
class Difference:
    """Our figure less another policy's, both relative to the full cache.

    Attributes:
        policy: The other.
        budget: Tokens.
        length: Nominal length.
        families: Per family, weak tasks left out.
        mean: Over the families, without the query-agnostic ones; None without others.

    """

    policy: str
    budget: int
    length: int
    families: dict[str, Figure]
    mean: Figure | None


def compare(records: Iterable[Record], tasks: dict[str, Task]) -> list[Difference]:
    """Differences to every served policy, on the samples that both have finished.

    Pairs that lack a task of the full cache's altogether are left out.
    """
    by_cell, full_of, weak = sort_out(records, tasks)
    differences = []
    for (policy, budget, length, way), cell in sorted(
        by_cell.items(), key=lambda item: (item[0][2], item[0][1] or 0, item[0][0])
    ):
        ours = by_cell.get((OURS, budget, length, way))
        full = full_of.get((length, way))
        if policy == OURS or budget is None or way != SERVED or not ours or not full:
            continue
        found = _difference(ours, cell, full, budget, weak[length], tasks)
        if found is not None:
            differences.append(Difference(policy, budget, length, *found))
    return differences


def _difference(
    ours: Cell,
    other: Cell,
    full: Cell,
    budget: int,
    weak: list[str],
    tasks: dict[str, Task],
) -> tuple[dict[str, Figure], Figure | None] | None:
    """Differences of the families and of their mean; None where a task is missing."""
    both = {
        name: ours[name].keys() & other[name].keys()
        for name in full
        if name in ours and name in other and name not in weak
    }
    if any(not both.get(name) for name in full if name not in weak):
        return None
    drawn: list[dict[str, tuple[Drawn, int]]] = []
    for cell in (ours, other):
        shared = {name: {i: cell[name][i] for i in both[name]} for name in both}
        pairs = pairs_of(shared, full, tasks, budget)
        counts = {name: len(found) for name, found in pairs.items()}
        relative = relative_of(pairs, budget, weak, tasks)
        drawn.append(families_of(relative, counts, tasks, list(relative)))
    mine, theirs = drawn
    gaps = {f: mine[f][0] - theirs[f][0] for f in mine}
    families = {f: figure_of(gap, mine[f][1]) for f, gap in gaps.items()}
    counted = aware(mine)
    if not counted:
        return families, None
    total = sum(n for _, n in counted.values())
    return families, figure_of(np.mean([gaps[f] for f in counted], axis=0), total)
