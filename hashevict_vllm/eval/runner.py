"""Runs what is not yet on disk, engine by engine, and appends every result."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm

from hashevict_vllm.config import KVPolicyError
from hashevict_vllm.eval.answers import OwnAnswers
from hashevict_vllm.eval.engine import EngineOptions, answer, engine
from hashevict_vllm.eval.grid import Cell, Policy
from hashevict_vllm.eval.records import Record, Store, sample_key, versions
from hashevict_vllm.eval.rule_digest import rule_digest
from hashevict_vllm.eval.tasks import TASKS
from hashevict_vllm.eval.tasks.base import Output, Sample, Task

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
        self.answers = OwnAnswers(store.path.with_name("answers.jsonl"))
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
        options = dataclasses.replace(self.options, **policy.engine)
        with ExitStack() as stack:
            llm = None
            for cell in cells:
                pending = self._pending(cell, resolved)
                pending = [each for each in pending if not self._known(cell, *each)]
                bar.update(self.samples - len(pending))
                bar.set_postfix_str(f"{cell.task} {cell.length}")
                if pending and llm is None:
                    wanted = policy.with_budget(budget)
                    # A little more than the longest sample: vLLM wants room for one
                    # token after the prompt.
                    llm = stack.enter_context(engine(options, wanted, longest + 8))
                for first in range(0, len(pending), options.batch):
                    batch = pending[first : first + options.batch]
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
        return sample_key(
            self.tasks[cell.task],
            model=self.options.model,
            dtype=self.options.dtype,
            options=resolved,
            rule=rule_digest(resolved),
            budget=cell.budget,
            length=cell.length,
            seed=self.seed,
            index=index,
        )

    def _prepared(self, cell: Cell, key: Record, sample: Sample) -> Sample:
        """The sample, with the full cache's answer as gold where the task wants it."""
        if not self.tasks[cell.task].uses_reference or cell.budget is None:
            return sample
        return self.answers.forced(key, sample)

    def _known(self, cell: Cell, key: Record, sample: Sample) -> bool:
        """Whether the full cache's own answer is kept already; then it is recorded."""
        if not self.tasks[cell.task].uses_reference or cell.budget is not None:
            return False
        output = self.answers.output(key, sample)
        if output is not None:
            self.store.add([self._record(cell, key, sample, output, 0.0)])
        return output is not None

    def _run_batch(
        self, llm: Any, cell: Cell, batch: list[tuple[Record, Sample]]
    ) -> None:
        task = self.tasks[cell.task]
        started = time.monotonic()
        outputs = answer(llm, self.tokenizer, [sample for _, sample in batch])
        seconds = (time.monotonic() - started) / len(batch)
        done = [(*each, output) for each, output in zip(batch, outputs, strict=True)]
        if task.uses_reference and cell.budget is None:
            self.answers.keep(done)
        self.store.add(self._record(cell, *each, seconds) for each in done)

    def _record(
        self, cell: Cell, key: Record, sample: Sample, output: Output, seconds: float
    ) -> Record:
        task = self.tasks[cell.task]
        return {
            **key,
            "policy": cell.policy.label,
            "score": task.score(sample, output),
            **details(task, sample, output),
            "tokens": sample.length,
            "seconds": round(seconds, 2),
            "versions": versions(),
        }


def details(task: Task, sample: Sample, output: Output) -> Record:
    """What the report or a reader may want besides the score."""
    details: Record = {}
    if sample.free:
        details["text"] = output.text
        details["answer_tokens"] = len(output.token_ids)
        details["finished"] = output.finished
    if task.metric == "perplexity":
        # The full cache's own answer is scored as it is made.
        skipped = sample.forced[0].scored_from if sample.forced else len(sample.opening)
        logprobs = output.logprobs[0] if sample.forced else output.free_logprobs
        details["first_position"] = len(sample.prompt) + skipped
        details["logprobs"] = [round(value, 4) for value in logprobs]
    return details
