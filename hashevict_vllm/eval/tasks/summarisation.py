"""Summarisation of long prose, and its perplexity at positions past the budget.

The texts are the essays of Debian's package ``anarchism``, cut at random places.

``summarisation/own``: the model summarises a text; the full cache's own summary is
forced and its NLL taken. (ROUGE-L with that summary is a noisy yardstick: the full
cache in another precision scores 72 of 100.)

``summarisation/prose``: the first half of a window is read as a prompt, the second is
decoded by force. Counted are the positions from the budget on, the same for the full
cache that it is compared with.
"""

from __future__ import annotations

from hashevict_vllm.eval import data
from hashevict_vllm.eval.tasks.base import (
    Continuation,
    Output,
    Sample,
    Task,
    Tokenizer,
    chat,
    encode,
    encode_prompt,
    largest,
    own_answers,
    rng_of,
    split_opening,
)

SUMMARY_TOKENS = 96
ASK = "Summarize the following text in a few sentences.\n\n{text}\n\nSummary:"
CHARACTERS_PER_TOKEN = 8
"""More than any tokenizer of English makes of a token, on average."""


def _excerpt(task: str, index: int, length: int, seed: int) -> str:
    """A piece of an essay that starts with a paragraph and is long enough."""
    rng = rng_of(task, length, seed, index)
    pages, wanted = data.prose(), length * CHARACTERS_PER_TOKEN
    pages = [page for page in pages if len(page) > wanted] or pages
    page = rng.choices(pages, weights=[len(page) for page in pages])[0]
    cut = rng.randrange(max(1, len(page) - wanted))
    start = page.find("\n\n", cut) + 2 if cut else 0
    return page[start : start + wanted]


def prose(n: int, length: int, seed: int, tokenizer: Tokenizer) -> list[Sample]:
    """`n` windows of exactly `length` tokens."""
    windows = []
    for index in range(n):
        text = _excerpt("summarisation/prose", index, length, seed)
        tokens = list(tokenizer.encode(text))[:length]
        if len(tokens) < length:
            raise ValueError(f"no essay has {length} tokens.")
        forced = (Continuation(tokens[length // 2 :]),)
        windows.append(Sample(index, tokens[: length // 2], forced=forced))
    return windows


def prose_score(sample: Sample, output: Output) -> dict[str, float]:
    """NLL per token of the second half; the report cuts it at the budget."""
    return {"nll": output.gold_nll}


def summaries(n: int, length: int, seed: int, tokenizer: Tokenizer) -> list[Sample]:
    """`n` texts to summarise, as long as fits."""
    return [_summary(index, length, seed, tokenizer) for index in range(n)]


def _summary(index: int, length: int, seed: int, tokenizer: Tokenizer) -> Sample:
    tokens = encode(tokenizer, _excerpt("summarisation/own", index, length, seed))
    made: dict[int, Sample] = {}

    def fits(size: int) -> bool:
        text = tokenizer.decode(tokens[:size]).strip()
        whole = encode_prompt(tokenizer, chat(tokenizer, ASK.format(text=text)))
        prompt, opening = split_opening(whole, [])
        made[size] = Sample(index, prompt, opening, free=SUMMARY_TOKENS)
        return made[size].length <= length

    return made[largest(8, min(len(tokens), length), fits)]


TASKS = [
    own_answers("summarisation/own", summaries),
    Task("summarisation/prose", prose, prose_score, metric="perplexity"),
]
