"""The full cache's own answers: made once by stock vLLM, then forced under a policy.

What a budget does to answers is seen best where the answers are the model's own: every
token of theirs was likely, and each one that turns unlikely is a place where greedy
decoding would have gone another way. Two policies are asked for the same tokens, so
that few samples tell them apart; and rules that no engine serves can be asked the same
(`hashevict_vllm.eval.offline`), from the same file.

One JSON line per answer: its key (`FIELDS`), ``prompt`` (token ids to read as a
prompt), ``opening`` (the prompt's last token or the answer's first words: decoded, not
scored), ``answer`` (token ids to decode and score, an end-of-turn token included),
``logprobs`` (of the answer under the full cache), ``text`` and ``finished`` (False:
cut at its longest).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from hashevict_vllm.eval.records import Record, Store, versions
from hashevict_vllm.eval.tasks.base import Continuation, Output, Sample

FIELDS = ("model", "dtype", "task", "length", "seed", "index")
"""What an answer depends on."""


class OwnAnswers:
    """A file of own answers.

    An answer whose prompt is no longer the sample's (a task was changed) is not found.
    """

    def __init__(self, path: Path):
        self.store = Store(path, FIELDS)

    def keep(self, done: Iterable[tuple[Record, Sample, Output]]) -> None:
        """Append what the full cache has answered."""
        self.store.add(
            {
                **{name: key[name] for name in FIELDS},
                "prompt": sample.prompt,
                "opening": sample.opening,
                "answer": output.token_ids,
                "logprobs": [round(value, 4) for value in output.free_logprobs],
                "text": output.text,
                "finished": output.finished,
                "versions": versions(),
            }
            for key, sample, output in done
        )

    def output(self, key: Record, sample: Sample) -> Output | None:
        """The full cache's output, None if it was not kept."""
        found = self.store.find(key)
        if found is None or found["prompt"] + found["opening"] != (
            sample.prompt + sample.opening
        ):
            return None
        return Output(
            found["text"],
            found["answer"],
            found["logprobs"],
            finished=found["finished"],
        )

    def forced(self, key: Record, sample: Sample) -> Sample:
        """The sample with the full cache's answer as its gold answer, and no other."""
        own = self.output(key, sample)
        assert own is not None, "the full cache's cells are run first"
        gold = Continuation(sample.opening + own.token_ids, len(sample.opening))
        return dataclasses.replace(sample, forced=(gold,), free=0, answers=(own.text,))
