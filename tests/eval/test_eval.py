"""The evaluation harness: forcing, tasks, scores, runner and report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import add_byte_tokenizer, make_llama, random_prompt

from hashevict_vllm.config import KVPolicyError
from hashevict_vllm.eval import data, grid, rule_digest
from hashevict_vllm.eval.engine import EngineOptions, answer, engine
from hashevict_vllm.eval.families import RECIPES
from hashevict_vllm.eval.losses import losses
from hashevict_vllm.eval.records import Store
from hashevict_vllm.eval.report import write_report
from hashevict_vllm.eval.runner import Runner
from hashevict_vllm.eval.tasks import (
    TASKS,
    choice,
    instructions,
    reasoning,
    retrieval,
)
from hashevict_vllm.eval.tasks.base import (
    Continuation,
    Output,
    Sample,
    Task,
    largest,
)

LENGTH = 512


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of bytes."""
    return add_byte_tokenizer(make_llama(tmp_path_factory.mktemp("eval") / "model"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, model_max_length=1 << 30)


@pytest.fixture(autouse=True, scope="module")
def sources() -> Iterator[None]:
    """Stand-ins for the source texts: the tests of tasks download nothing."""
    sentences = [f"Sentence number {i} says that it is {i}." for i in range(400)]
    documents = [f"Fact {i}: the colour of town {i} is shade {i}." for i in range(40)]
    questions = [
        data.Question(
            f"What is the colour of town {i}?",
            (f"shade {i:02}",),
            (i,),
            tuple(j for j in range(40) if j != i),
        )
        for i in range(40)
    ]
    template = {
        "template": "Read.\n{context}\nWhat about {query}?",
        "answer_prefix": " Answer:",
        "tokens_to_generate": 24,
    }
    bases = {name: template for name in _BASES}
    settings = {name: dict(_SETTINGS) for name in _CONFIGURATIONS}
    settings["niah_multikey_2"]["type_haystack"] = "needle"
    settings["niah_single_1"]["type_haystack"] = "repeat"
    items = [
        {"question": f"What is {i} and 1?", "answer": f"<<{i}+1>>It is.\n#### {i + 1}"}
        for i in range(300)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "ruler_settings", lambda: (bases, settings))
        patch.setattr(data, "essays", lambda: sentences)
        patch.setattr(data, "squad", lambda: (questions, documents))
        patch.setattr(data, "hotpotqa", lambda: (questions, documents))
        patch.setattr(data, "gsm8k", lambda: items)
        patch.setattr(data, "prose", lambda: ["\n\n".join(sentences) * 3])
        patch.setattr(data, "word_list", lambda kind: [f"{kind}{i}" for i in range(99)])
        yield


_BASES = ("niah", "variable_tracking", "common_words_extraction")
_BASES += ("freq_words_extraction", "qa")
_CONFIGURATIONS = [task.name.partition("/")[2] for task in retrieval.TASKS[:13]]
_SETTINGS = {
    "type_haystack": "essay",
    "type_needle_k": "words",
    "type_needle_v": "numbers",
    "num_needle_k": 2.0,
    "num_needle_v": 1.0,
    "num_needle_q": 1.0,
    "num_chains": 1.0,
    "num_hops": 2.0,
    "num_cw": 3.0,
    "alpha": 2.0,
    "dataset": "squad",
}
ALL = list(TASKS.values())


# --- forcing -------------------------------------------------------------------------


def test_forced_tokens_have_the_log_probabilities_of_transformers(
    model: Path, tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM

    prompts = [random_prompt(100, seed) for seed in range(3)]
    golds = [random_prompt(40, seed + 9) for seed in range(3)]
    for gold in golds:
        gold[1] = tokenizer.eos_token_id  # of a turn before; no answer ends there
    samples = [
        Sample(i, prompt, opening=gold[:3], free=5, forced=(Continuation(gold, 4),))
        for i, (prompt, gold) in enumerate(zip(prompts, golds, strict=True))
    ]
    options = EngineOptions(str(model), "float32", batch=4, kv_gib=0.0625)
    with engine(options, {"name": "full"}, 256) as llm:
        outputs = answer(llm, tokenizer, samples)

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for prompt, gold, output in zip(prompts, golds, outputs, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + gold])).logits[0]
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logprobs[torch.arange(len(gold)), torch.tensor(gold)]
        assert len(output.logprobs[0]) == len(gold) - 4
        assert sum(output.logprobs[0]) == pytest.approx(
            float(expected[4:].sum()), abs=1e-3
        )
        # After its opening the free answer is the model's own choice.
        with torch.no_grad():
            free = reference(torch.tensor([prompt + gold[:3]])).logits[0, -1]
        assert output.token_ids[0] == int(free.argmax())


def test_forcing_refuses_what_is_not_a_list_of_tokens() -> None:
    from vllm import SamplingParams

    from hashevict_vllm.eval.forcing import FORCED, ForcedTokens

    ForcedTokens.validate_params(SamplingParams(extra_args={FORCED: [1, 2]}))
    with pytest.raises(ValueError, match="expected a list of token ids"):
        ForcedTokens.validate_params(SamplingParams(extra_args={FORCED: "1"}))


# --- tasks ---------------------------------------------------------------------------


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_samples_are_well_formed_and_fit_the_nominal_length(
    task: Task, tokenizer: Any
) -> None:
    length = 4 * LENGTH  # a byte is a token here
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


# --- scores --------------------------------------------------------------------------


def test_string_match_counts_the_gold_strings_found() -> None:
    answers = ("Blue", "12345")
    assert retrieval.string_match("it is blue", answers, any_of=False) == 0.5
    assert retrieval.string_match("it is blue", answers, any_of=True) == 1.0
    assert retrieval.string_match("none", answers, any_of=True) == 0.0


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
    import random

    question = data.squad()[0][7]
    found = choice.options(question, random.Random(0))
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


# --- grid ----------------------------------------------------------------------------


def test_policies_are_read_from_names_pairs_and_json() -> None:
    assert grid.parse_policy("paper").options["preset"] == "paper"
    held = grid.parse_policy("hashevict:segment=prompt,hash_bits=32")
    assert held.options == {"name": "hashevict", "segment": "prompt", "hash_bits": 32}
    named = grid.parse_policy('{"name": "hashevict", "label": "ours"}', "segment=64")
    assert (named.label, named.options["segment"]) == ("ours segment=64", 64)
    assert grid.parse_policy("full", "segment=64").options == {"name": "full"}
    with pytest.raises(KVPolicyError, match="did you mean 'hash_bits'"):
        grid.parse_policy("hashevict:hash_bit=32")
    for name in grid.default_policies():
        grid.parse_policy(name)


def test_equal_budgets_share_an_engine_and_the_full_cache_comes_first() -> None:
    policies = [grid.parse_policy("hashevict"), grid.parse_policy("full")]
    engines = grid.cells(policies, ["50%", "512", "2000"], ["t"], [1024, 2048])
    found = [(p.label, b, [c.length for c in cells]) for p, b, cells in engines]
    assert found == [
        ("full", None, [1024, 2048]),
        ("hashevict", 512, [1024, 2048]),
        ("hashevict", 1024, [2048]),
        ("hashevict", 2000, [2048]),
    ]


def test_results_are_filed_by_the_source_of_their_rule(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    policies = ("hashevict", "paper", "streaming_llm")
    options = {name: grid.parse_policy(name).resolved(256) for name in policies}

    original = rule_digest.PACKAGE

    def digests(change: str = "", file: str = "policies/vote.py") -> list[str | None]:
        copy = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(original, copy)
        source = copy / file
        source.write_text(source.read_text() + change)
        monkeypatch.setattr(rule_digest, "PACKAGE", copy)
        rule_digest._digest.cache_clear()
        return [rule_digest.rule_digest(options[name]) for name in policies]

    vote, paper, streaming = digests()
    assert len({vote, paper, streaming}) == 3
    assert digests("# a comment\n") == [vote, paper, streaming]
    changed = digests("MORE = 1\n")
    assert changed[0] != vote
    assert changed[1:] == [paper, streaming]
    assert digests("MORE = 1\n", "kernels/cpu/evict.py")[0] not in (vote, changed[0])
    assert digests("MORE = 1\n", "policies/hashevict.py")[::2] == [vote, streaming]
    assert rule_digest.rule_digest({"name": "full"}) is None
    rule_digest._digest.cache_clear()


# --- runner --------------------------------------------------------------------------


def test_a_run_is_resumed_where_it_stopped_and_reported(
    model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    names = ("retrieval/niah_single_2", "choice/squad_late", *_SUMMARISATION)
    tasks = {task.name: task for task in ALL if task.name in names}
    policies = [
        grid.parse_policy("hashevict:recent=8"),
        grid.parse_policy("full:block_size=64"),
        grid.parse_policy('{"name": "hashevict", "recent": 500, "label": "refused"}'),
    ]
    engines = grid.cells(policies, ["25%"], list(tasks), [LENGTH])
    options = EngineOptions(str(model), "float32", batch=4, kv_gib=0.0625)
    store = Store(tmp_path / "results.jsonl")
    Runner(options, store, samples=2, tasks=tasks).run(engines)
    text = store.path.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == 3 * 2 * len(tasks)  # the refused policy has none
    for line in lines:
        assert line["score"]["nll"] > 0
        assert line["versions"]["torch"]
        assert line["tokens"] <= LENGTH

    # Cut in the middle of the last line: only that sample is run again.
    store.path.write_text(text[:-20])
    resumed = Store(store.path)
    assert len(resumed.records) == len(lines) - 1
    Runner(options, resumed, samples=2, tasks=tasks).run(engines)
    again = [json.loads(line) for line in store.path.read_text().splitlines()]
    assert [_timeless(line) for line in again] == [_timeless(line) for line in lines]

    report = write_report(again, tasks, tmp_path, "command").read_text()
    assert "| hashevict:recent=8 | 128 (25%) |" in report
    assert "refused" not in report
    assert "### `summarisation/own`: loss in nats per token past the budget" in report
    _check_own_answers(store.path.with_name("answers.jsonl"), again, tasks)
    for plot in ("mean", "summarisation"):
        assert (tmp_path / f"{plot}-{LENGTH}.png").stat().st_size > 1000


def _check_own_answers(path: Path, records: list[dict], tasks: dict[str, Task]) -> None:
    """The full cache's answers are kept once; another full cache loses nothing."""
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(a["task"], a["index"]) for a in answers] == [
        ("summarisation/own", 0),
        ("summarisation/own", 1),
    ]
    own = [r for r in records if r["task"] == "summarisation/own"]
    for record in own:
        answer = answers[record["index"]]
        assert len(record["logprobs"]) == len(answer["answer"])
        first = len(answer["prompt"]) + len(answer["opening"])
        assert record["first_position"] == first
    found = {x.policy: x for x in losses(own, tasks)}
    assert abs(found["full:block_size=64"].loss.value) < 1e-4  # float32
    assert found["full:block_size=64"].unlikely.value == 0
    assert found["hashevict:recent=8"].loss.value > 1e-3


_SUMMARISATION = ("summarisation/own", "summarisation/prose")


def _timeless(record: dict) -> dict:
    return {key: value for key, value in record.items() if key != "seconds"}
