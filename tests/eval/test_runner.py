"""Runs of the harness: forced tokens, resumed results, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import random_prompt

from hashevict_vllm.eval import grid
from hashevict_vllm.eval.engine import EngineOptions, answer, engine
from hashevict_vllm.eval.losses import losses
from hashevict_vllm.eval.records import Store
from hashevict_vllm.eval.report import write_report
from hashevict_vllm.eval.runner import Runner
from hashevict_vllm.eval.tasks import TASKS
from hashevict_vllm.eval.tasks.base import Continuation, Sample, Task

LENGTH = 512

pytestmark = pytest.mark.usefixtures("sources")


def test_forced_tokens_have_the_log_probabilities_of_transformers(
    byte_llama: Path, tokenizer: Any
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
    options = EngineOptions(str(byte_llama), "float32", batch=4, kv_gib=0.0625)
    with engine(options, {"name": "full"}, 256) as llm:
        outputs = answer(llm, tokenizer, samples)

    reference = AutoModelForCausalLM.from_pretrained(byte_llama, dtype=torch.float32)
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


def test_a_run_is_resumed_where_it_stopped_and_reported(
    byte_llama: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    names = ("retrieval/niah_single_2", "choice/squad_late", *_SUMMARISATION)
    tasks = {task.name: task for task in TASKS.values() if task.name in names}
    policies = [
        grid.parse_policy("hashevict:recent=8"),
        grid.parse_policy("full:block_size=64"),
        grid.parse_policy('{"name": "hashevict", "recent": 500, "label": "refused"}'),
    ]
    engines = grid.cells(policies, ["25%"], list(tasks), [LENGTH])
    options = EngineOptions(str(byte_llama), "float32", batch=4, kv_gib=0.0625)
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
