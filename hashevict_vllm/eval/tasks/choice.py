"""Multiple choice on documents: the gold answer among plausible others.

Built from the SQuAD of RULER's package. The options are the gold answer and three
answers to other questions on the same article, of the gold answer's kind (with or
without digits) where there are such. The model never sees the list: each option is
decoded as the answer, and the one with the highest log-likelihood per token is chosen.

The question stands after the context. Scoring an answer right after a prompt would
test the prefill, which saw everything, not the cache; so at least the last token before
it (``squad``) is decoded first, and in ``squad_late`` the whole question too: the
prompt is reduced before anyone knows what will be asked, as in a conversation's second
turn.

Score: 1 for a right choice, -1/3 for a wrong one, so that guessing gets 0; and the NLL
of the gold answer.
"""

from __future__ import annotations

import random

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
    mean,
    rng_of,
    split_opening,
    spoken,
)
from hashevict_vllm.eval.tasks.retrieval import documents_text

OPTIONS = 4


def options(
    question: data.Question, article: list[data.Question], rng: random.Random
) -> list[str]:
    """The gold answer and plausible others; fewer when the article has too few."""
    gold = question.answers[0]
    others = {
        answer
        for other in article
        for answer in other.answers[:1]
        if not any(_overlap(answer, right) for right in question.answers)
    }
    digits = any(c.isdigit() for c in gold)
    ranked = sorted(others)
    rng.shuffle(ranked)
    ranked.sort(
        key=lambda text: (
            any(c.isdigit() for c in text) != digits,
            abs(len(text.split()) - len(gold.split())) > 2,
        )
    )
    chosen: list[str] = []
    for answer in ranked:
        if len(chosen) < OPTIONS - 1 and not any(_overlap(answer, c) for c in chosen):
            chosen.append(answer)
    return [gold, *chosen]


def _overlap(a: str, b: str) -> bool:
    a, b = a.lower(), b.lower()
    return a in b or b in a


def _sample(
    late: bool,
    articles: data.Articles,
    index: int,
    length: int,
    seed: int,
    tokenizer: Tokenizer,
) -> Sample:
    template = data.ruler_settings()[0]["qa"]
    made: dict[int, Sample] = {}

    def fits(size: int) -> bool:
        rng = rng_of("choice/squad", length, seed, index)  # the same late and early
        questions, documents = data.squad()
        choices: list[str] = []
        while len(choices) < OPTIONS:
            question = rng.choice(questions)
            choices = options(question, articles[question.article], rng)
        context = documents_text(question, documents, size, rng)
        user = template["template"].format(context=context, query=question.query)
        text = chat(tokenizer, user)
        opening = spoken(tokenizer, template["answer_prefix"])
        if late:
            cut = text.index(context) + len(context)
            text, opening = text[:cut], text[cut:] + opening
        prompt, said = encode_prompt(tokenizer, text), encode(tokenizer, opening)
        if not late:
            prompt, said = split_opening(prompt, said)
        made[size] = Sample(
            index=index,
            prompt=prompt,
            forced=tuple(
                Continuation(said + encode(tokenizer, " " + choice), len(said))
                for choice in choices
            ),
            answers=tuple(choices),
        )
        return made[size].length <= length

    return made[largest(1, length // 16, fits)]


def score(sample: Sample, output: Output) -> dict[str, float]:
    """Chance-corrected choice by log-likelihood per token; the gold option is first."""
    likely = [mean(logprobs) for logprobs in output.logprobs]
    right = all(likely[0] > other for other in likely[1:])
    wrong = -1 / (len(likely) - 1)
    return {"score": 1.0 if right else wrong, "nll": output.gold_nll}


def _make(name: str, late: bool) -> Task:
    def samples(n: int, length: int, seed: int, tokenizer: Tokenizer) -> list[Sample]:
        articles = data.by_article(data.squad()[0])
        return [_sample(late, articles, i, length, seed, tokenizer) for i in range(n)]

    return Task(name, samples, score)


TASKS = [_make("choice/squad", late=False), _make("choice/squad_late", late=True)]
