"""Reasoning: GSM8K's test set (Cobbe et al., 2021).

``reasoning/chains`` and ``reasoning/solved``: zero-shot chains of thought, for models
that can reason. A question has a hundred tokens, the chain as many again or more, so
that budgets of about a hundred tokens act while the model reasons. *Chains* are the
full cache's own answers, forced; *solved* is the share of right answers of a policy's
own. Both ask the same questions.

``reasoning/gsm8k``: few-shot, for models that cannot: the prompt is filled with worked
examples up to the nominal length, as few-shot evaluation does; they come from the last
200 items of the test set, which are never asked (the package has no training set).
Plain text, no chat template: a base model's format.

Score of the last two: the number after ``####`` (without it, the last number) equals
the gold one; of the few-shot task also the NLL of the gold solution.
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
    chat,
    encode,
    encode_prompt,
    largest,
    own_answers,
    rng_of,
    split_opening,
)

NAME = "reasoning/gsm8k"
EXAMPLES = 200
OPENING = "\nAnswer:"
ASK = (
    "{question}\n\nReason step by step, in a few short sentences, and end with a line "
    "of #### and the answer, a number."
)
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


def chains(n: int, length: int, seed: int, tokenizer: Tokenizer) -> list[Sample]:
    """`n` questions, zero-shot; the chain may fill what is left of the length."""
    items = data.gsm8k()
    order = list(range(len(items) - EXAMPLES))
    rng_of("reasoning/chains", 0, seed, -1).shuffle(order)
    return [
        _chain(index, items[order[index % len(order)]], length, tokenizer)
        for index in range(n)
    ]


def _chain(
    index: int, item: dict[str, str], length: int, tokenizer: Tokenizer
) -> Sample:
    text = chat(tokenizer, ASK.format(question=item["question"]))
    prompt, opening = split_opening(encode_prompt(tokenizer, text), [])
    free = length - len(prompt) - len(opening)
    answer = final_number(item["answer"]) or ""
    return Sample(index, prompt, opening, free=max(1, free), answers=(answer,))


def solved_score(sample: Sample, output: Output) -> dict[str, float]:
    """Exact match of the final number of the policy's own chain."""
    return {"score": float(final_number(output.text) == sample.answers[0])}


TASKS = [
    Task(NAME, samples, score),
    own_answers("reasoning/chains", chains),
    Task("reasoning/solved", chains, solved_score),
]
