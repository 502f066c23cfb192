"""Tasks: their samples and scores."""

from __future__ import annotations

import random
from typing import Any

import pytest

from hashevict_vllm.eval import data, grid
from hashevict_vllm.eval.families import RECIPES
from hashevict_vllm.eval.tasks import (
    TASKS,
    chats,
    choice,
    instructions,
    reasoning,
    retrieval,
)
from hashevict_vllm.eval.tasks.base import Output, Sample, Task, largest

pytestmark = pytest.mark.usefixtures("sources")


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_samples_are_well_formed_and_fit_the_nominal_length(
    task: Task, tokenizer: Any
) -> None:
    length = 2048  # a byte is a token here
    samples = task.samples(3, length, 0, tokenizer)
    assert [sample.index for sample in samples] == [0, 1, 2]
    assert len({tuple(sample.prompt) for sample in samples}) == 3
    for sample in samples:
        assert length // 2 <= sample.length <= length
        assert sample.free or sample.forced
        assert not (sample.forced and task.uses_reference)
        for continuation in sample.forced:
            assert 0 <= continuation.scored_from < len(continuation.tokens)
        if task.name.startswith("retrieval") or task.name == reasoning.NAME:
            gold = sample.forced[0]
            assert gold.tokens[: gold.scored_from] == sample.opening
            text = tokenizer.decode(gold.tokens)
            matched = sample.answers if task.name != reasoning.NAME else ()
            assert all(answer in text for answer in matched)
    # More samples extend a run; another seed is another sample.
    assert task.samples(1, length, 0, tokenizer) == samples[:1]
    assert task.samples(3, length, 1, tokenizer) != samples


def test_needles_are_in_the_prompt(tokenizer: Any) -> None:
    for task in retrieval.TASKS[:8]:
        (sample,) = task.samples(1, 2048, 0, tokenizer)
        text = tokenizer.decode(sample.prompt)
        assert all(f"is: {value}." in text for value in sample.answers)


def test_late_questions_are_decoded_not_read(tokenizer: Any) -> None:
    early, late = (task.samples(1, 1024, 0, tokenizer)[0] for task in choice.TASKS)
    assert early.answers == late.answers
    assert "What about" in tokenizer.decode(early.prompt)
    assert "What about" not in tokenizer.decode(late.prompt)
    for a, b in zip(early.forced, late.forced, strict=True):
        assert early.prompt + a.tokens == late.prompt + b.tokens
        assert a.tokens[a.scored_from :] == b.tokens[b.scored_from :]


def test_the_largest_size_that_fits_is_found() -> None:
    assert largest(1, 100, lambda size: size <= 37) == 37
    assert largest(1, 100, lambda size: True) == 100
    with pytest.raises(ValueError, match="too short"):
        largest(1, 100, lambda size: False)


def test_string_match_counts_the_gold_strings_found() -> None:
    answers = ("Blue", "12345")
    assert retrieval.string_match("it is blue", answers, any_of=False) == 0.5
    assert retrieval.string_match("it is blue", answers, any_of=True) == 1.0
    assert retrieval.string_match("none", answers, any_of=True) == 0.0


def test_replies_of_a_chat_are_compared_as_squad_compares_answers() -> None:
    sample = Sample(0, [1], answers=("dating to 1338–39", "1338–39"))

    def score(text: str) -> float:
        return chats.match_score(sample, Output(text=text))["score"]

    assert score("They are dated to 1338-39.") == 1
    assert score("They are dated to 1338.") == 0
    assert score("It was 11338-391.") == 0  # words, not parts of them
    assert chats.normalized('The "Hockey-stick"  graph, $1,000.') == (
        "hockeystick graph 1000"
    )
    nothing = Sample(0, [1], answers=("interventionism", "."))
    assert chats.match_score(nothing, Output(text="I do not know."))["score"] == 0


def test_final_numbers_are_read_as_gsm8k_writes_them() -> None:
    assert reasoning.final_number("3 + 4\n#### 1,007") == "1007"
    assert reasoning.final_number("so the answer is $18.00.") == "18"
    assert reasoning.final_number("#### -5\n#### 6") == "-5"
    assert reasoning.final_number("none") is None
    assert reasoning.solution("2+2=<<2+2=4>>4 eggs") == "2+2=4 eggs"


def test_choice_takes_the_likeliest_option_per_token() -> None:
    sample = Sample(0, [1], answers=("a", "b", "c", "d"))
    right = Output(logprobs=[[-1.0, -1.0], [-1.5], [-2.0], [-3.0]])
    wrong = Output(logprobs=[[-1.0, -1.0], [-0.5], [-2.0], [-3.0]])
    assert choice.score(sample, right) == {"score": 1.0, "nll": 1.0}
    assert choice.score(sample, wrong)["score"] == pytest.approx(-1 / 3)


def test_options_are_different_answers_of_the_same_article() -> None:
    questions = data.squad()[0]
    found = choice.options(questions[7], questions, random.Random(0))
    assert found[0] == "shade 07"
    assert len(set(found)) == choice.OPTIONS


def test_rules_are_obeyed_word_by_word() -> None:
    kept = instructions.obeyed(
        "Robot: thanks, dear sort. **Shopping**!", "robot", "Sort", "Shopping"
    )
    assert kept == [True, True, True]
    kept = instructions.obeyed(
        "Thanks, Robot, and sorted shopping bye", "Robot", "Sort", "Shopping"
    )
    assert kept == [False, False, False]
    assert instructions.obeyed("", "a", "b", "c") == [False, False, False]


def test_turns_of_a_chat_read_the_same_text_and_the_whole_history(
    tokenizer: Any,
) -> None:
    turns = [
        tokenizer.decode(sample.prompt + sample.opening)
        for sample in TASKS["chats/own"].samples(3, 2048, 0, tokenizer)
    ]
    assert turns[1].startswith(turns[0])
    assert turns[2].startswith(turns[1])


def test_a_chat_whose_paragraphs_are_too_long_is_drawn_anew(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, documents = data.squad()
    long = [text * 40 if i % 5 == 0 else text for i, text in enumerate(documents)]
    monkeypatch.setattr(data, "squad", lambda: (questions, long))
    samples = TASKS["chats/own"].samples(60, 600, 0, tokenizer)
    assert all(sample.length <= 600 for sample in samples)
    monkeypatch.setattr("hashevict_vllm.eval.tasks.chats.DRAWS", 0)
    with pytest.raises(ValueError, match="too short"):
        TASKS["chats/own"].samples(60, 600, 0, tokenizer)


def test_every_recipe_names_tasks_that_there_are() -> None:
    for recipe in RECIPES.values():
        for name in recipe.tasks:
            assert any(task == name or task.startswith(f"{name}/") for task in TASKS)
        assert all(
            grid.parse_budget(b, recipe.length) < recipe.length for b in recipe.budgets
        )
