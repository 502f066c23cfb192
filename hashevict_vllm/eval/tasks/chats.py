"""Chats: three questions on one text, each sent with the whole history before it.

A chat is what clients of an API send: the text with the first question; then the same
with the answer and the second question; and so on. Sample i is turn i mod 3 of chat
i div 3; answers in the history are the gold ones, so that every policy reads the same.
Texts and questions are articles of SQuAD, a question per paragraph.

``chats/own``: the full cache's own reply, forced. ``chats/match``: whether a gold
answer occurs in the policy's own reply, both as `normalized`: a model that writes a
hyphen for the text's dash has read it all the same.
"""

from __future__ import annotations

import random
import string
import unicodedata
from dataclasses import dataclass

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

TURNS = 3
LEFT_OUT = {"a", "an", "the"}
"""Words that a comparison of answers does not count."""
REPLY_TOKENS = 64
DRAWS = 50
"""How often at most a chat is drawn anew because its three paragraphs do not fit."""
ASK = "{text}\n\n{query} Answer in one sentence."


def samples(n: int, length: int, seed: int, tokenizer: Tokenizer) -> list[Sample]:
    """`n` turns; the last of each chat is as long as fits.

    Raises:
        ValueError: When none of `DRAWS` chats has paragraphs short enough.

    """
    articles = [
        asked
        for asked in data.by_article(data.squad()[0]).values()
        if _paragraphs(asked) >= TURNS
    ]
    return [_sample(articles, index, length, seed, tokenizer) for index in range(n)]


@dataclass(frozen=True)
class _Chat:
    """Three questions of one article, a paragraph each, and its other paragraphs."""

    three: list[data.Question]
    related: list[int]

    def prompt(self, size: int, turns: int, tokenizer: Tokenizer) -> list[int]:
        """Token ids of a text of `size` paragraphs and of the talk up to a turn."""
        documents = data.squad()[1]
        others = self.related[: size - TURNS]
        shown = sorted({q.gold[0] for q in self.three} | set(others))
        text = "\n\n".join(documents[i] for i in shown)
        messages = []
        for place, question in enumerate(self.three[: turns + 1]):
            shape = ASK if place == 0 else ASK.removeprefix("{text}\n\n")
            said = shape.format(text=text, query=question.query)
            messages.append({"role": "user", "content": said})
            if place < turns:
                reply = question.answers[0].rstrip(".") + "."
                messages.append({"role": "assistant", "content": reply})
        return encode_prompt(tokenizer, conversation(tokenizer, messages))


def _sample(
    articles: list[list[data.Question]],
    index: int,
    length: int,
    seed: int,
    tokenizer: Tokenizer,
) -> Sample:
    number, turn = divmod(index, TURNS)
    rng = rng_of("chats", length, seed, number)
    chat = _draw(rng, articles)

    def fits(size: int) -> bool:
        # The same text in all turns: what fits is asked of the last.
        prompt = chat.prompt(size, TURNS - 1, tokenizer)
        return len(prompt) + REPLY_TOKENS <= length

    for _ in range(DRAWS):
        if fits(TURNS):
            break
        chat = _draw(rng, articles)
    size = largest(TURNS, TURNS + len(chat.related), fits)
    prompt, opening = split_opening(chat.prompt(size, turn, tokenizer), [])
    answers = chat.three[turn].answers
    return Sample(index, prompt, opening, free=REPLY_TOKENS, answers=answers)


def _draw(rng: random.Random, articles: list[list[data.Question]]) -> _Chat:
    asked = rng.choice(articles).copy()
    rng.shuffle(asked)
    one_each = list({question.gold[0]: question for question in asked}.values())
    three = one_each[:TURNS]
    related = [i for i in three[0].related if i not in {q.gold[0] for q in three}]
    rng.shuffle(related)
    return _Chat(three, related)


def _paragraphs(questions: list[data.Question]) -> int:
    return len({question.gold[0] for question in questions})


def normalized(text: str) -> str:
    """Words of a text as SQuAD's own evaluation compares them.

    Lower case, without ASCII's punctuation and English articles (Rajpurkar et al.,
    arXiv 1606.05250, section 6.1); here without Unicode's other punctuation as well, as
    the texts have dashes and quotes.
    """
    kept = (c for c in text.lower() if not _is_punctuation(c))
    return " ".join(word for word in "".join(kept).split() if word not in LEFT_OUT)


def _is_punctuation(c: str) -> bool:
    return c in string.punctuation or unicodedata.category(c).startswith("P")


def match_score(sample: Sample, output: Output) -> dict[str, float]:
    """Whether the words of a gold answer occur, one after the other."""
    reply = f" {normalized(output.text)} "
    # An answer of punctuation alone has no words.
    answers = [words for answer in sample.answers if (words := normalized(answer))]
    return {"score": float(any(f" {words} " in reply for words in answers))}


TASKS = [
    own_answers("chats/own", samples),
    Task("chats/match", samples, match_score, version=2),
]
