"""Reasoning: GSM8K's test set (Cobbe et al., 2021), with worked examples as context.

A question has a hundred tokens, too few for any budget to act. The prompt is therefore
filled with worked examples up to the nominal length, as few-shot evaluation does; they
come from the last 200 items of the test set, which are never asked (the package has no
training set). Plain text, no chat template: a base model's format.

Score: the number after ``####`` equals the gold one (exact match); and the NLL of the
whole gold solution.
"""

from __future__ import annotations

import re

from hashevict_vllm.eval import data
from hashevict_vllm.eval.tasks.base import (
    Continuation,
    Output,
    Sample,
    Task,
    Tokenizer,
    encode,
    largest,
    rng_of,
    split_opening,
)

NAME = "reasoning/gsm8k"
EXAMPLES = 200
OPENING = "\nAnswer:"
FREE = 192


def solution(answer: str) -> str:
    """A gold answer without the calculator's notes."""
    return re.sub(r"<<[^>]*>>", "", answer)


def final_number(text: str) -> str | None:
    """The number after ``####``, else the last one; None if there is none."""
    marked = re.findall(r"####\s*(-?[\d,]*\.?\d+)", text)
    numbers = marked[:1] or re.findall(r"-?[\d,]*\.?\d+", text)[-1:]
    if not numbers:
        return None
    return f"{float(numbers[0].replace(',', '')):g}"


def samples(n: int, length: int, seed: int, tokenizer: Tokenizer) -> list[Sample]:
    """`n` questions of the test set, each after as many examples as fit."""
    items = data.gsm8k()
    asked = list(range(len(items) - EXAMPLES))
    rng_of(NAME, length, seed, -1).shuffle(asked)
    return [
        _sample(i, items[asked[i % len(asked)]], length, seed, tokenizer)
        for i in range(n)
    ]


def _sample(
    index: int, item: dict[str, str], length: int, seed: int, tokenizer: Tokenizer
) -> Sample:
    pool = data.gsm8k()[-EXAMPLES:]
    shots = rng_of(NAME, length, seed, index).sample(pool, EXAMPLES)
    gold = encode(tokenizer, " " + solution(item["answer"]))
    made: dict[int, Sample] = {}

    def fits(count: int) -> bool:
        text = "".join(
            f"Question: {shot['question']}{OPENING} {solution(shot['answer'])}\n\n"
            for shot in shots[:count]
        )
        asked = list(tokenizer.encode(f"{text}Question: {item['question']}"))
        prompt, opening = split_opening(asked, encode(tokenizer, OPENING))
        made[count] = Sample(
            index=index,
            prompt=prompt,
            opening=opening,
            free=FREE,
            stop=("\nQuestion:",),
            forced=(Continuation(opening + gold, len(opening)),),
            answers=(final_number(item["answer"]) or "",),
        )
        return made[count].length <= length

    return made[largest(0, min(EXAMPLES, length // 64), fits)]


def score(sample: Sample, output: Output) -> dict[str, float]:
    """Exact match of the final number, and the NLL of the gold solution."""
    right = final_number(output.text) == sample.answers[0]
    return {"score": float(right), "nll": output.gold_nll}


TASKS = [Task(NAME, samples, score)]
