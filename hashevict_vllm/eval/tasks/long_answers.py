"""Long answers: stories, programs and lists that refer back, as long as fits.

The prompt is a sentence or two; all that the budget holds is the model's own text.
The full cache's own answers are sampled, not greedy: small models fall into loops
otherwise, and a loop is easy to go on with. The temperature and ``top_p`` are those of
Qwen2.5's generation config; an end of turn is not sampled before the answer is long.
"""

from __future__ import annotations

from hashevict_vllm.eval.tasks.base import (
    Sample,
    Tokenizer,
    chat,
    encode_prompt,
    own_answers,
    rng_of,
    split_opening,
)

NAME = "long_answers/own"
ENOUGH = 0.73
"""Share of the nominal length before which no answer ends: 1,500 of 2,048 tokens."""
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05}

STORY = (
    "Write a long story, in at least twelve chapters with titles, about {who} who "
    "finds {what} {where}. Give every person a name and an aim, and let the ending "
    "resolve what the first chapter promises."
)
PROGRAM = (
    "Write a complete Python program of several classes that manages {things}: storage "
    "in a file, search, reports, a command line, and unit tests of every method. Then "
    "explain the program method by method."
)
LIST = (
    "List forty facts about {topic}, numbered. From the tenth on, say in every item to "
    "which earlier item it is related, by its number, and why."
)
WHO = ("a clockmaker", "a lighthouse keeper", "a young cartographer", "a retired diver")
WHAT = ("a map of the sea", "a letter without a sender", "a door", "a broken compass")
WHERE = ("in a flooded library", "under a bakery", "on the last ferry", "in the snow")
THINGS = (
    *("a library's loans", "recipes", "a garden's plants", "a club's chess games"),
    *("train timetables", "a hospital's beds", "museum exhibits", "bike rentals"),
)
TOPICS = (
    *("the ocean", "bridges", "bees", "the history of bread", "volcanoes", "glass"),
    *("the human hand", "rivers of Europe", "sleep", "paper", "salt", "bicycles"),
)


def samples(n: int, length: int, seed: int, tokenizer: Tokenizer) -> list[Sample]:
    """`n` requests, the three kinds in turn."""
    return [_sample(index, length, seed, tokenizer) for index in range(n)]


def _sample(index: int, length: int, seed: int, tokenizer: Tokenizer) -> Sample:
    rng = rng_of(NAME, 0, seed, index)
    ask = (
        STORY.format(
            who=rng.choice(WHO), what=rng.choice(WHAT), where=rng.choice(WHERE)
        ),
        PROGRAM.format(things=rng.choice(THINGS)),
        LIST.format(topic=rng.choice(TOPICS)),
    )[index % 3]
    whole = encode_prompt(tokenizer, chat(tokenizer, ask))
    prompt, opening = split_opening(whole, [])
    free = length - len(whole)
    if free < 1:
        raise ValueError("the nominal length is too short for this task.")
    enough = min(int(ENOUGH * length), free)
    sampling = {**SAMPLING, "seed": seed * 10_000 + index, "min_tokens": enough}
    return Sample(index, prompt, opening, free=free, sampling=sampling)


TASKS = [own_answers(NAME, samples)]
