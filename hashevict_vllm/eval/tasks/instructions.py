"""Instructions given first: three rules in a system prompt, obeyed after a long talk.

The rules concern the last question alone and name words that occur nowhere else, so
that nothing but the beginning of the prompt says how to reply. They stand in one
sentence: neither SmolLM2-135M nor Qwen2.5-Coder-1.5B obeys a numbered list of them.
The talk between is questions on SQuAD's paragraphs with their gold answers, as long
as fits.

``instructions/own``: the full cache's own reply, forced. ``instructions/obeyed``: the
share of the rules that the policy's own reply obeys, checked by code.
"""

from __future__ import annotations

from hashevict_vllm.eval import data
from hashevict_vllm.eval.tasks.base import (
    Output,
    Sample,
    Task,
    Tokenizer,
    conversation,
    encode_prompt,
    largest,
    own_answers,
    rng_of,
    split_opening,
)

REPLY_TOKENS = 64
VERSION = 2
"""The first gave the rules as a numbered list."""
SYSTEM = (
    "You are a helpful assistant. When the user says FINAL, begin your reply with the "
    "word {first}, call the user {name}, and end with the word {last}."
)
FINAL = "FINAL: thank me for this conversation."


def samples(n: int, length: int, seed: int, tokenizer: Tokenizer) -> list[Sample]:
    """`n` talks, as long as fits."""
    return [_sample(index, length, seed, tokenizer) for index in range(n)]


def _sample(index: int, length: int, seed: int, tokenizer: Tokenizer) -> Sample:
    rng = rng_of("instructions", length, seed, index)
    nouns = [word for word in data.word_list("noun") if word.isalnum()]
    first, name, last = (word.capitalize() for word in rng.sample(nouns, 3))
    questions, documents = data.squad()
    talk = rng.sample(questions, min(len(questions), length // 64))
    system = SYSTEM.format(first=first, name=name, last=last)
    made: dict[int, Sample] = {}

    def fits(size: int) -> bool:
        messages = [{"role": "system", "content": system}]
        for question in talk[:size]:
            said = f"{documents[question.gold[0]]}\n\n{question.query}"
            reply = question.answers[0].rstrip(".") + "."
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": reply})
        messages.append({"role": "user", "content": FINAL})
        text = conversation(tokenizer, messages)
        prompt, opening = split_opening(encode_prompt(tokenizer, text), [])
        answers = (first, name, last)
        made[size] = Sample(index, prompt, opening, free=REPLY_TOKENS, answers=answers)
        return made[size].length <= length

    return made[largest(1, len(talk), fits)]


def obeyed(text: str, first: str, name: str, last: str) -> list[bool]:
    """Which of the three rules a reply obeys; case and punctuation do not count."""
    words = [word.strip(".,:;!?*'\"()").lower() for word in text.split()]
    return [
        words[:1] == [first.lower()],
        name.lower() in words,
        words[-1:] == [last.lower()],
    ]


def obeyed_score(sample: Sample, output: Output) -> dict[str, float]:
    """Share of the rules obeyed."""
    kept = obeyed(output.text, *sample.answers)
    return {"score": sum(kept) / len(kept)}


TASKS = [
    own_answers("instructions/own", samples, VERSION),
    Task("instructions/obeyed", samples, obeyed_score, version=VERSION),
]
