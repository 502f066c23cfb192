"""Runs what is not yet on disk, sample by sample: one prefill serves all rules."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tqdm import tqdm

from hashevict_vllm.eval.answers import OwnAnswers
from hashevict_vllm.eval.offline.generate import answer
from hashevict_vllm.eval.offline.model import OfflineModel
from hashevict_vllm.eval.offline.rules import Full, Rule
from hashevict_vllm.eval.records import Record, Store, sample_key, versions
from hashevict_vllm.eval.runner import details
from hashevict_vllm.eval.tasks import TASKS
from hashevict_vllm.eval.tasks.base import Sample

NO_LIMIT = 1 << 30
"""Budget of the full cache."""


class OfflineRunner:
    """One offline run.

    Args:
        model: Directory of the model.
        dtype: ``auto`` or a name of torch's.
        store: Where results are and go.
        samples: Samples per task.
        seed: Seed of all samples.

    """

    def __init__(
        self, model: str, dtype: str, store: Store, *, samples: int, seed: int = 0
    ):
        from transformers import AutoTokenizer

        self.path, self.dtype, self.store = model, dtype, store
        self.samples, self.seed = samples, seed
        self.answers = OwnAnswers(store.path.with_name("answers.jsonl"))
        tokenizer = AutoTokenizer.from_pretrained(model, model_max_length=1 << 30)
        self.model = OfflineModel(model, tokenizer, dtype)

    def run(self, rules: Sequence[Rule], tasks: Sequence[str], length: int) -> None:
        """Run every task under every rule, sample 0 of all tasks first."""
        ordered = [Full(NO_LIMIT), *sorted(rules, key=lambda rule: rule.budget)]
        made = {task: self.samples_of(task, length) for task in tasks}
        with tqdm(total=self.samples * len(tasks), unit="sample") as bar:
            for index in range(self.samples):
                for task in tasks:
                    bar.set_postfix_str(f"{task} {index}")
                    self._run_sample(ordered, task, length, made[task][index])
                    bar.update()

    def samples_of(self, task: str, length: int) -> list[Sample]:
        """The samples of a task."""
        return TASKS[task].samples(
            self.samples, length, self.seed, self.model.tokenizer
        )

    def _run_sample(
        self, rules: Sequence[Rule], task: str, length: int, sample: Sample
    ) -> None:
        keys = [self._key(rule, task, length, sample.index) for rule in rules]
        if TASKS[task].uses_reference:
            # The gold answer is the full cache's: the served engine's where it is kept.
            if self.answers.output(keys[0], sample) is None:
                (output,) = answer(self.model, sample, rules[:1])
                self.answers.keep([(keys[0], sample, output)])
            sample = self.answers.forced(keys[0], sample)
        missing = [
            (rule, key)
            for rule, key in zip(rules, keys, strict=True)
            if self.store.find(key) is None
        ]
        if missing:
            self._answer(
                [rule for rule, _ in missing],
                [key for _, key in missing],
                task,
                sample,
            )

    def _answer(
        self, rules: Sequence[Rule], keys: list[Record], task: str, sample: Sample
    ) -> None:
        started = time.monotonic()
        outputs = answer(self.model, sample, rules)
        seconds = (time.monotonic() - started) / len(rules)
        self.store.add(
            {
                **key,
                "policy": rule.label,
                "way": "offline",
                "score": TASKS[task].score(sample, output),
                **details(TASKS[task], sample, output),
                "tokens": sample.length,
                "seconds": round(seconds, 2),
                "versions": versions(),
            }
            for rule, key, output in zip(rules, keys, outputs, strict=True)
        )

    def _key(self, rule: Rule, task: str, length: int, index: int) -> Record:
        return sample_key(
            TASKS[task],
            model=self.path,
            dtype=self.dtype,
            options=rule.options,
            rule=rule.digest,
            budget=None if isinstance(rule, Full) else rule.budget,
            length=length,
            seed=self.seed,
            index=index,
        )
