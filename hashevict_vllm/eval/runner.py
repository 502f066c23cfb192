"""Runs what is not yet on disk, engine by engine, and appends every result."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hashevict_vllm.config import KVPolicyError
from hashevict_vllm.eval.engine import EngineOptions, answer, engine
from hashevict_vllm.eval.grid import FULL, Cell, Policy
from hashevict_vllm.eval.records import Record, Store, versions
from hashevict_vllm.eval.tasks import TASKS
from hashevict_vllm.eval.tasks.base import Continuation, Output, Sample, Task

Engines = Sequence[tuple[Policy, int | None, list[Cell]]]


class Runner:
    """One run of a grid.

    Args:
        options: The engines' common options.
        store: Where results are and go.
        seed: Seed of all samples.
        samples: Samples per cell.
        tasks: The tasks by name.

    """

    def __init__(
        self,
        options: EngineOptions,
        store: Store,
        *,
        samples: int,
        seed: int = 0,
        tasks: dict[str, Task] = TASKS,
    ):
        from transformers import AutoTokenizer

        self.options, self.store = options, store
        self.samples, self.seed, self.tasks = samples, seed, tasks
        self.tokenizer = AutoTokenizer.from_pretrained(
            options.model,
            model_max_length=1 << 30,  # whole essays are tokenized, then cut
        )
        self.samples_of = functools.cache(self._samples_of)

    def run(self, engines: Engines) -> None:
        """Run every cell; a policy that refuses its budget is reported and skipped."""
        total = self.samples * sum(len(cells) for _, _, cells in engines)
        longest = max(cell.length for _, _, cells in engines for cell in cells)
        with tqdm(total=total, unit="sample", smoothing=0.05) as bar:
            for policy, budget, cells in engines:
                bar.set_description(f"{policy.label}@{budget or 'full'}")
                try:
                    self._run_engine(policy, budget, cells, longest, bar)
                except KVPolicyError as error:
                    print(f"skipped {policy.label}@{budget}: {error}", file=sys.stderr)
                    bar.total -= self.samples * len(cells)

    def _run_engine(
        self, policy: Policy, budget: int | None, cells: list[Cell], longest: int, bar
    ) -> None:
        resolved = policy.resolved(budget)
        with ExitStack() as stack:
            llm = None
            for cell in cells:
                pending = self._pending(cell, resolved)
                bar.update(self.samples - len(pending))
                bar.set_postfix_str(f"{cell.task} {cell.length}")
                if pending and llm is None:
                    wanted = policy.with_budget(budget)
                    # A little more than the longest sample: vLLM wants room for one
                    # token after the prompt.
                    llm = stack.enter_context(engine(self.options, wanted, longest + 8))
                for first in range(0, len(pending), self.options.batch):
                    batch = pending[first : first + self.options.batch]
                    self._run_batch(llm, cell, batch)
                    bar.update(len(batch))

    def _samples_of(self, task: str, length: int) -> list[Sample]:
        make = self.tasks[task].samples
        return make(self.samples, length, self.seed, self.tokenizer)

    def _pending(
        self, cell: Cell, resolved: dict[str, Any]
    ) -> list[tuple[Record, Sample]]:
        """The samples of a cell that have no result yet, with their keys."""
        keys = [self._key(cell, resolved, index) for index in range(self.samples)]
        missing = [key for key in keys if self.store.find(key) is None]
        if not missing:
            return []
        samples = self.samples_of(cell.task, cell.length)
        return [
            (key, self._prepared(cell, key, samples[key["index"]])) for key in missing
        ]

    def _key(self, cell: Cell, resolved: dict[str, Any], index: int) -> Record:
        return {
            "model": Path(self.options.model).name,
            "dtype": self.options.dtype,
            "options": resolved,
            "budget": cell.budget,
            "task": cell.task,
            "length": cell.length,
            "seed": self.seed,
            "index": index,
        }

    def _prepared(self, cell: Cell, key: Record, sample: Sample) -> Sample:
        """The sample, with the full cache's answer as gold where the task wants it."""
        if not self.tasks[cell.task].uses_reference or cell.budget is None:
            return sample
        full = {**key, "options": {"name": FULL}, "budget": None}
        reference = self.store.find(full)
        assert reference is not None, "the full cache's cells are run first"
        ids = reference["token_ids"]
        gold = Continuation(sample.opening + ids, len(sample.opening))
        return dataclasses.replace(sample, forced=(gold,), answers=(reference["text"],))

    def _run_batch(
        self, llm: Any, cell: Cell, batch: list[tuple[Record, Sample]]
    ) -> None:
        task = self.tasks[cell.task]
        started = time.monotonic()
        outputs = answer(llm, self.tokenizer, [sample for _, sample in batch])
        seconds = (time.monotonic() - started) / len(batch)
        self.store.add(
            {
                **key,
                "policy": cell.policy.label,
                "score": task.score(sample, output),
                **details(task, sample, output),
                "tokens": sample.length,
                "seconds": round(seconds, 2),
                "versions": versions(),
            }
            for (key, sample), output in zip(batch, outputs, strict=True)
        )


def details(task: Task, sample: Sample, output: Output) -> Record:
    """What the report or a reader may want besides the score."""
    details: Record = {}
    if sample.free:
        details["text"] = output.text
    if task.uses_reference:
        details["token_ids"] = output.token_ids
    if task.metric == "perplexity":
        first = len(sample.prompt) + sample.forced[0].scored_from
        details["first_position"] = first
        details["logprobs"] = [round(value, 4) for value in output.logprobs[0]]
    return details
