"""Steps of vLLM's own engine, stock or with a budget, in this process."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from hashevict_vllm.config import kv_policy
from hashevict_vllm.verify.bench.sizes import Sizes

Clock = Callable[[], float]
"""Seconds, as `time.perf_counter`."""


@dataclass(frozen=True)
class Steps:
    """Decode steps of a batch.

    Attributes:
        mean: Seconds of a step, over whole periods of ballots.
        slowest: Seconds of the slowest step of a period: the one in which everybody
            votes, if all prompts were read in the same step.

    """

    mean: float
    slowest: float

    @classmethod
    def of(cls, seconds: Sequence[float], every: int) -> Steps:
        """From consecutive steps, in each of which one in ``every`` tokens votes.

        Steps are folded over the period, and the largest of the medians is taken. Which
        it is is not asked: with asynchronous scheduling ``step`` waits for an earlier
        one.

        Raises:
            ValueError: For less than one period.

        """
        if len(seconds) < every:
            raise ValueError(f"{len(seconds)} steps are less than a period of {every}.")
        phases = [median(seconds[i::every]) for i in range(every)]
        return cls(fmean(seconds), max(phases))


def write_model(path: Path, sizes: Sizes) -> None:
    """The configuration of a model, whose weights vLLM makes up."""
    (path / "config.json").write_text(json.dumps(dict(sizes.model)))


@contextmanager
def running(
    model: Path, sizes: Sizes, budget: int | None, pool: int
) -> Iterator[Bench]:
    """An engine with room for all that is timed; stock without a budget.

    Args:
        model: From `write_model`.
        sizes: What is timed.
        budget: C; None for stock vLLM.
        pool: Bytes of its cache.

    """
    from vllm import LLM

    from hashevict_vllm.eval.engine import shut_down

    options = dict(sizes.engine)
    if budget is not None:
        policy = {"segment": sizes.segment, **sizes.policy, "budget": budget}
        options["additional_config"] = kv_policy("hashevict", **policy)
    llm = LLM(
        str(model),
        dtype=sizes.dtype,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=sizes.longest,
        max_num_seqs=max(*sizes.batches, sizes.beside + 1),
        max_num_batched_tokens=sizes.chunk,
        kv_cache_memory_bytes=pool,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
        **options,
    )
    try:
        yield Bench(llm.llm_engine, sizes, budget)
    finally:
        shut_down(llm)


class Bench:
    """What is timed on one engine."""

    def __init__(
        self,
        engine: Any,
        sizes: Sizes,
        budget: int | None,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Time an ``LLMEngine``."""
        self.engine, self.sizes, self.budget = engine, sizes, budget
        self.clock = clock
        self._numbers = random.Random(0)
        self._count = 0

    def decode(self, batch: int, slots: int) -> Steps:
        """Steps in which so many requests decode, each attending to ``slots`` slots.

        Stock requests grow, and pass that length in the middle.
        """
        sizes = self.sizes
        before = 0 if self.budget else sizes.warm_up + sizes.steps // 2
        names = self._decode_from([slots - before] * batch)
        for _ in range(sizes.warm_up):
            self.engine.step()
        seconds = [self._timed(self.engine.step) for _ in range(sizes.steps)]
        self._abort(names)
        return Steps.of(seconds, sizes.every(slots))

    def read_prompts(self, beside: int) -> float:
        """Median seconds until a prompt is read, while so many requests decode.

        These have a full budget, or as many slots in stock vLLM.
        """
        sizes = self.sizes
        names = self._decode_from([sizes.budgets[0]] * beside)
        self._read_prompt()  # what is compiled or captured first
        seconds = [self._timed(self._read_prompt) for _ in range(sizes.repeats)]
        self._abort(names)
        return median(seconds)

    def _timed(self, work: Callable[[], Any]) -> float:
        start = self.clock()
        work()
        return self.clock() - start

    def _read_prompt(self) -> None:
        (name,) = self._add([self.sizes.prompt], tokens=1)
        while not any(out.request_id == name for out in self._finished()):
            pass

    def _finished(self) -> list[Any]:
        return [out for out in self.engine.step() if out.finished]

    def _decode_from(self, prompts: Sequence[int]) -> list[str]:
        """Names of new requests, each of which has decoded a token.

        Raises:
            RuntimeError: If one of them ended before all had.

        """
        room = self.sizes.longest - max(prompts, default=0)
        names = self._add(prompts, tokens=room - 1)
        waiting = set(names)
        while waiting:
            for out in self.engine.step():
                if out.finished:
                    raise RuntimeError("A request ended before all had begun.")
                waiting.discard(out.request_id)
        return names

    def _add(self, prompts: Sequence[int], tokens: int) -> list[str]:
        from vllm import SamplingParams

        names = []
        for length in prompts:
            self._count += 1
            names.append(str(self._count))
            vocabulary = self.sizes.model["vocab_size"]
            ids = [self._numbers.randrange(3, vocabulary) for _ in range(length)]
            self.engine.add_request(
                names[-1],
                {"prompt_token_ids": ids},
                SamplingParams(
                    temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
                ),
            )
        return names

    def _abort(self, names: Sequence[str]) -> None:
        self.engine.abort_request(list(names))
        while self.engine.has_unfinished_requests():
            self.engine.step()
