"""Own answers in nats: what a budget costs per token past it, against noise alone.

- *Loss*: log-probability of a token under the full cache less that under the policy,
  mean over the tokens at positions from the budget on (all of them for a second full
  cache, whose loss is the noise ceiling: no policy can be better).
- *Unlikely*: share of these tokens whose probability fell by more than half.

Both are ratios of sums over samples; intervals are 95 % percentile bootstraps over
samples, drawn for the policy and the full cache together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hashevict_vllm.eval.aggregate import RESAMPLES, Figure, figure_of, sort_out
from hashevict_vllm.eval.records import Record
from hashevict_vllm.eval.tasks.base import Task

UNLIKELY = np.log(2)
"""Loss in nats from which on a token counts as turned unlikely."""


@dataclass(frozen=True)
class Loss:
    """What a policy loses on one task of own answers.

    Attributes:
        policy, budget, task, length: The cell; a budget of 0 is a full cache.
        loss: Nats per token past the budget.
        unlikely: Share of them.
        tokens: Tokens past the budget.

    """

    policy: str
    budget: int
    task: str
    length: int
    loss: Figure
    unlikely: Figure
    tokens: int


def losses(records: Sequence[Record], tasks: dict[str, Task]) -> list[Loss]:
    """Losses of every policy on every task that has no right answers.

    Samples whose answer ends before the budget count for nothing.
    """
    by_cell, full_of, _ = sort_out(records, tasks)
    found = []
    for (policy, budget, length, way), cell in by_cell.items():
        full = full_of.get((length, way))
        if budget is None or full is None:
            continue
        for name in cell:
            if tasks[name].metric != "perplexity":
                continue
            pairs = [
                (r, full[name][i]) for i, r in cell[name].items() if i in full[name]
            ]
            gaps = [gap for pair in pairs if len(gap := gap_of(*pair, budget))]
            if gaps:
                figures = _figures(gaps)
                tokens = sum(map(len, gaps))
                found.append(Loss(policy, budget, name, length, *figures, tokens))
    return sorted(found, key=lambda x: (x.length, x.task, x.budget, x.loss.value))


def gap_of(record: Record, full: Record, budget: int) -> np.ndarray:
    """Loss of every token past the budget."""
    first = max(0, budget - record["first_position"])
    return np.array(full["logprobs"][first:]) - np.array(record["logprobs"][first:])


def _figures(gaps: list[np.ndarray]) -> tuple[Figure, Figure]:
    n = len(gaps)
    rng = np.random.default_rng(0)
    picks = np.vstack([np.arange(n), rng.integers(n, size=(RESAMPLES, n))])
    counts = np.array([len(gap) for gap in gaps])[picks].sum(axis=1)
    sums = np.array([gap.sum() for gap in gaps])[picks].sum(axis=1)
    fell = np.array([(gap > UNLIKELY).sum() for gap in gaps])[picks].sum(axis=1)
    return figure_of(sums / counts, n), figure_of(fell / counts, n)
