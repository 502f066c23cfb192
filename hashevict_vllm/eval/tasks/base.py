"""What a task is: samples for the engine, and how their outputs are scored.

Every answer is decoded after the prompt has been read and reduced. The fixed words that
open an answer (RULER's "answer prefix") end the prompt, as in RULER, except for their
last token, which is forced: the first token that is scored therefore comes from the
evicting cache, never from a dense prefill.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

LATE = "_late"
"""End of the names of tasks whose question is decoded, not read with the prompt."""
AGNOSTIC = "query-agnostic"
"""What reports call those; all others reduce the cache when the question is known."""

Tokenizer = Any
"""A transformers tokenizer."""


@dataclass(frozen=True)
class Continuation:
    """Tokens to force after the prompt; those from `scored_from` on are scored."""

    tokens: list[int]
    scored_from: int = 0


@dataclass(frozen=True)
class Sample:
    """One prompt and what is decoded after it.

    Attributes:
        index: Number within its task, length and seed.
        prompt: Token ids to read.
        opening: Token ids forced before the free answer.
        free: Tokens the model may generate after the opening; 0 is none.
        stop: Strings that end the free answer.
        forced: Continuations scored by their log-probability; the first is the gold
            answer.
        answers: Gold strings.
        sampling: Keys of vLLM's `SamplingParams` for the free answer; greedy if none.

    """

    index: int
    prompt: list[int]
    opening: list[int] = field(default_factory=list)
    free: int = 0
    stop: tuple[str, ...] = ()
    forced: tuple[Continuation, ...] = ()
    answers: tuple[str, ...] = ()
    sampling: Mapping[str, float] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of the longest request: prompt and output."""
        forced = [len(continuation.tokens) for continuation in self.forced]
        return len(self.prompt) + max([len(self.opening) + self.free, *forced])


@dataclass(frozen=True)
class Output:
    """What the engine made of a sample.

    Attributes:
        text: The free answer, without its opening.
        token_ids: Its tokens.
        free_logprobs: Their log-probabilities.
        logprobs: Per continuation, of the scored tokens.
        finished: Whether the free answer ended by itself.

    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    free_logprobs: list[float] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    finished: bool = True

    @property
    def gold_nll(self) -> float:
        """Negative log-probability per token of the gold answer."""
        return -mean(self.logprobs[0])


class Samples(Protocol):
    """Makes `n` samples of at most `length` tokens, the same for the same `seed`."""

    def __call__(
        self, n: int, length: int, seed: int, tokenizer: Tokenizer
    ) -> list[Sample]:
        """Sample i does not depend on n, so that more samples extend a run."""


@dataclass(frozen=True)
class Task:
    """One column of the grid.

    Attributes:
        name: ``family/task``.
        samples: The generator.
        score: Maps a sample and its output to ``score`` (1 is right, 0 what guessing
            gets) and, where there is a gold answer to force, its ``nll`` (nats per
            token).
        metric: ``score``, or ``perplexity`` for a task that has no right answers.
        uses_reference: Whether the gold answer is the full cache's own output, which
            is made once and kept (`hashevict_vllm.eval.answers`).
        version: Of prompts and score, once they were changed: results of another
            version are neither taken for done nor reported.

    """

    name: str
    samples: Samples
    score: Callable[[Sample, Output], dict[str, float]]
    metric: str = "score"
    uses_reference: bool = False
    version: int | None = None

    @property
    def family(self) -> str:
        """The task family it counts for; one with known questions has no others."""
        family = self.name.partition("/")[0]
        return f"{family}, {AGNOSTIC}" if self.name.endswith(LATE) else family


def own_score(sample: Sample, output: Output) -> dict[str, float]:
    """NLL of the full cache's own answer; of its first making, if it is being made."""
    logprobs = output.logprobs[0] if sample.forced else output.free_logprobs
    return {"nll": -mean(logprobs) if logprobs else 0.0}


def own_answers(name: str, samples: Samples, version: int | None = None) -> Task:
    """Make a task that forces the full cache's own answers (`..answers`)."""
    return Task(
        name,
        samples,
        own_score,
        metric="perplexity",
        uses_reference=True,
        version=version,
    )


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def rng_of(task: str, length: int, seed: int, index: int) -> random.Random:
    """The random source of one sample."""
    return random.Random(f"{task}/{length}/{seed}/{index}")


def split_opening(prompt: list[int], opening: list[int]) -> tuple[list[int], list[int]]:
    """Move all but the last token of an answer's opening (or prompt) to the prompt."""
    tokens = prompt + opening
    return tokens[:-1], tokens[-1:]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text in the middle of a sequence."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def chat(tokenizer: Tokenizer, user: str) -> str:
    """A user's turn up to where the answer begins; plain for base models."""
    return conversation(tokenizer, [{"role": "user", "content": user}])


def conversation(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> str:
    """A conversation up to where the next answer begins; plain for base models."""
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in messages)
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of the start of a sequence; a chat template writes its own BOS."""
    return list(tokenizer.encode(text, add_special_tokens=not tokenizer.chat_template))


def spoken(tokenizer: Tokenizer, opening: str) -> str:
    """The opening of an answer: a chat turn does not begin with a space."""
    return opening.strip() if tokenizer.chat_template else opening.rstrip()


def largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """Largest size in [low, high] that fits, for a test that is (nearly) monotone.

    Raises:
        ValueError: When not even `low` fits.

    """
    smallest = low
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    while not fits(low):
        low -= 1
        if low < smallest:
            raise ValueError("the nominal length is too short for this task.")
    return low
