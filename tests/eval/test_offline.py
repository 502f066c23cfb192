"""The offline evaluation: baselines with exact attention, and oracles of our rule."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import add_byte_tokenizer, make_llama, random_prompt

from hashevict_vllm.config import KVPolicyError
from hashevict_vllm.eval.offline import runner as offline_runner
from hashevict_vllm.eval.offline.generate import answer, force, reduce_prompt
from hashevict_vllm.eval.offline.model import OfflineModel, PromptLayer
from hashevict_vllm.eval.offline.rules import RULES, Full, Rule
from hashevict_vllm.eval.offline.rules.base import PromptOnly, lowest, top
from hashevict_vllm.eval.offline.rules.h2o import H2O
from hashevict_vllm.eval.offline.rules.last_queries import LastQueries
from hashevict_vllm.eval.offline.rules.press import Press
from hashevict_vllm.eval.offline.rules.rkv import redundancy
from hashevict_vllm.eval.offline.rules.vote import ExactVoteRule, VoteRule
from hashevict_vllm.eval.offline.slots import Slots, Step
from hashevict_vllm.eval.records import Store
from hashevict_vllm.eval.tasks.base import Continuation, Output, Sample, Task
from hashevict_vllm.policies.reference import ReferenceLayer

PROMPT, STEPS, BUDGET = 300, 40, 128
HAS_KVPRESS = importlib.util.find_spec("kvpress") is not None
"""It wants transformers < 5.3, and vLLM newer ones: scripts/evaluate-offline."""

OURS = [name for name, kind in RULES.items() if not issubclass(kind, Press)]
KVPRESS = [name for name in RULES if name not in OURS]
RUN_HERE = OURS + KVPRESS * HAS_KVPRESS
EVERY = pytest.mark.parametrize("name", RUN_HERE)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_byte_tokenizer(make_llama(tmp_path_factory.mktemp("offline") / "model"))


@pytest.fixture(scope="module")
def model(path: Path) -> OfflineModel:
    from transformers import AutoTokenizer

    return OfflineModel(str(path), AutoTokenizer.from_pretrained(path), "float32")


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return random_prompt(PROMPT + STEPS)


@pytest.fixture(scope="module")
def prompt(model: OfflineModel, tokens: list[int]) -> PromptLayer:
    return model.layer(model.prefill(tokens), 1, PROMPT)


def _forced(
    model: OfflineModel, tokens: list[int], rules: list[Rule], copies: int = 1
) -> torch.Tensor:
    read = model.prefill(tokens[:PROMPT])
    reduced = reduce_prompt(model, read, rules, PROMPT)
    return force(model, read, rules, reduced, [tokens[PROMPT:]] * copies)


# --- mechanism -----------------------------------------------------------------------


def test_the_full_cache_has_the_log_probabilities_of_transformers(
    model: OfflineModel, path: Path, tokens: list[int]
) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits = reference(torch.tensor([tokens])).logits[0, PROMPT - 1 : -1]
    wanted = torch.tensor(tokens[PROMPT:])
    expected = logits.log_softmax(-1)[torch.arange(STEPS), wanted]
    found = _forced(model, tokens, [Full(1 << 30)], copies=2)
    torch.testing.assert_close(found, expected.expand(1, 2, -1), atol=1e-3, rtol=0)


@EVERY
def test_a_budget_that_holds_all_changes_nothing(
    name: str, model: OfflineModel, tokens: list[int]
) -> None:
    found = _forced(model, tokens, [Full(1 << 30), RULES[name](PROMPT + STEPS)])
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=0)


@EVERY
def test_every_rule_keeps_its_budget_and_its_protected_slots(
    name: str, prompt: PromptLayer
) -> None:
    rule = RULES[name](BUDGET)
    kept = rule.keep(prompt)
    assert kept.position.shape == (1, 2, BUDGET)
    assert (kept.position.diff(dim=-1) > 0).all()
    recent = set(range(PROMPT - rule.recent, PROMPT))
    assert all(recent <= set(head.tolist()) for head in kept.position[0])
    generator = torch.Generator().manual_seed(0)
    for t in range(PROMPT, PROMPT + STEPS):
        q = torch.randn(1, 2, 2, 32, generator=generator)
        k, v = torch.randn(2, 1, 2, 32, generator=generator)
        before = kept.position.clone()
        rule.step(kept, Step(q, k, v, t, PROMPT, prompt.scale))
        position = kept.position[0]
        assert position.shape == (2, BUDGET)
        for head, old in zip(position, before[0], strict=True):
            gone = set(old.tolist()) - set(head.tolist())
            assert len(gone) == 1
            assert len(set(head.tolist())) == BUDGET
            assert t in head
            assert rule.sinks <= gone.pop() <= t - 1 - rule.recent


def test_rules_side_by_side_decode_as_each_alone(
    model: OfflineModel, tokens: list[int]
) -> None:
    kinds = [RULES[name] for name in RUN_HERE]
    rules: list[Rule] = [Full(1 << 30)]
    rules += [kind(budget) for budget in (96, BUDGET) for kind in kinds]
    together = _forced(model, tokens, rules)
    for rule, found in zip(rules, together, strict=True):
        alone = _forced(model, tokens, [rule])[0]
        torch.testing.assert_close(found, alone, atol=1e-3, rtol=0)


# --- rules ---------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [BUDGET, 200, PROMPT + 8])
def test_votes_decide_as_the_oracle(budget: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(PROMPT + STEPS, 4, 32, generator=generator)
    k, v = torch.randn(2, PROMPT + STEPS, 2, 32, generator=generator)
    scale = 32**-0.5
    rule = VoteRule(budget)
    oracle = ReferenceLayer(rule.policy, PROMPT, num_kv_heads=2, head_dim=32)
    oracle.forward(q[:PROMPT], k[:PROMPT], v[:PROMPT], scale)
    layer = PromptLayer(
        q[:PROMPT].transpose(0, 1).unflatten(0, (2, 2)),
        k[:PROMPT].transpose(0, 1),
        v[:PROMPT].transpose(0, 1),
        scale,
        None,
        torch.empty(0),
    )
    kept = rule.keep(layer)
    assert torch.equal(kept.position[0], oracle.slots.position)
    torch.testing.assert_close(kept.stat[0], oracle.slots.votes)
    for t in range(PROMPT, PROMPT + STEPS):
        at = slice(t, t + 1)
        expected = oracle.forward(q[at], k[at], v[at], scale)
        new = (q[t].unflatten(0, (2, 2))[None], k[at], v[at])
        found = rule.step(kept, Step(*new, t, PROMPT, scale))
        torch.testing.assert_close(found.flatten(0, 2), expected[0])
        live = kept.position[0].sort(-1).values
        assert torch.equal(live, oracle.slots.position)


def test_the_served_engine_answers_as_the_offline_vote(
    path: Path, model: OfflineModel
) -> None:
    """Float32 and one request at a time: only rounding differs."""
    pytest.importorskip("vllm")
    from hashevict_vllm.eval.engine import EngineOptions, engine
    from hashevict_vllm.eval.engine import answer as served

    samples = []
    for seed in range(3):
        text = random_prompt(PROMPT + 60, seed)
        gold = Continuation(text[PROMPT:], 2)
        opening = text[PROMPT : PROMPT + 2]
        samples.append(Sample(seed, text[:PROMPT], opening, free=20, forced=(gold,)))
    options = EngineOptions(str(path), "float32", batch=1, kv_gib=0.0625)
    policy = {"name": "hashevict", "segment": "prompt", "budget": BUDGET}
    with engine(options, policy, 512) as llm:
        outputs = served(llm, model.tokenizer, samples)
    for sample, theirs in zip(samples, outputs, strict=True):
        ours, full = answer(model, sample, [VoteRule(BUDGET), Full(1 << 30)])
        assert ours.token_ids == theirs.token_ids
        assert ours.logprobs[0] == pytest.approx(theirs.logprobs[0], abs=1e-3)
        assert full.logprobs[0] != pytest.approx(theirs.logprobs[0], abs=1)


def test_exact_votes_are_attention_itself(prompt: PromptLayer) -> None:
    """Centring keys shifts all logits of a query alike."""
    rule = ExactVoteRule(BUDGET)
    voters = rule.policy.voters(0, PROMPT, PROMPT)
    position = torch.arange(PROMPT).expand(2, -1)
    expected = torch.zeros(2, PROMPT)
    for i in voters:  # a query votes on the slots before it
        logits = prompt.q[:, :, i, None] @ prompt.k[:, None, :i].transpose(2, 3)
        expected[:, :i] += (logits * prompt.scale).softmax(-1)[:, :, 0].amax(1)
    found = rule._votes(prompt, position, voters)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_h2o_keeps_the_recent_and_the_most_attended(prompt: PromptLayer) -> None:
    logits = prompt.q @ prompt.k[:, None].transpose(2, 3) * prompt.scale
    causal = torch.ones(PROMPT, PROMPT, dtype=torch.bool).tril()
    weights = logits.masked_fill(~causal, float("-inf")).softmax(-1)
    received = weights.sum((1, 2))[:, : PROMPT - BUDGET // 2]
    index = H2O(BUDGET).keep(prompt).position[0]
    for head in range(2):
        hitters = received[head].topk(BUDGET // 2).indices.sort().values
        assert index[head, : BUDGET // 2].tolist() == hitters.tolist()


def test_the_last_queries_are_asked_at_every_token(prompt: PromptLayer) -> None:
    """Against attention kept in a list, by position; two appended, then evictions."""
    rule = LastQueries(PROMPT + 2)
    slots = rule.keep(prompt)
    rows = [
        [dict(enumerate(row)) for row in head.amax(0).tolist()]
        for head in prompt.attention(8)
    ]
    generator = torch.Generator().manual_seed(3)
    for t in range(PROMPT, PROMPT + 12):
        q = torch.randn(1, 2, 2, 32, generator=generator)
        k, v = torch.randn(2, 1, 2, 32, generator=generator)
        rule.step(slots, Step(q, k, v, t, PROMPT, prompt.scale))
        logits = q @ slots.k.transpose(-1, -2) * prompt.scale
        newest = logits.softmax(-1)[0].amax(1).tolist()
        for head in range(2):
            live = slots.position[0, head].tolist()
            rows[head].append(dict(zip(live, newest[head], strict=True)))
            order = sorted(live)
            mean = [
                sum(row.get(at, 0.0) for row in rows[head][-8:]) / 8 for at in order
            ]
            found = dict(zip(live, slots.stat[0, head].tolist(), strict=True))
            for i, at in enumerate(order):
                expected = max(mean[max(0, i - 3) : i + 4])
                assert found[at] == pytest.approx(expected, rel=1e-4)


def test_redundancy_spares_the_newest_of_keys_alike() -> None:
    k = torch.randn(40, 16, generator=torch.Generator().manual_seed(4))
    k[10] = k[3] * 2  # the same direction twice, and a third near it
    k[30] = k[3] + 0.1
    cosine = torch.nn.functional.cosine_similarity
    total = torch.zeros(40)
    for i in range(40):
        alike = {j: cosine(k[i], k[j], dim=0) for j in range(40) if j != i}
        newest = max((j for j, value in alike.items() if value > 0.5), default=None)
        for j, value in alike.items():
            total[j] += 0.0 if j == newest else value
    found = redundancy(k)
    torch.testing.assert_close(found, (total / 40).softmax(-1))
    assert found[[3, 10]].min() > found.mean()


def test_prompt_only_rules_give_up_the_prompt_before_new_tokens() -> None:
    position = torch.tensor([0, 1, 2, 3, 7, 8, 20, 21])[None, None]
    stat = torch.tensor([0.0, 0, 0, 0, 2, 1, torch.inf, torch.inf])[None, None]
    empty = torch.empty(1, 1, 8, 0)
    slots = Slots(empty, empty, position, stat, torch.empty(1, 1, 0, 8))
    sinks = PromptOnly.sinks
    assert lowest(slots, sinks, 0, 22).item() == 5
    stat[..., 4:6] = torch.inf
    assert lowest(slots, sinks, 0, 22).item() == 4
    position[..., 4:6] = torch.tensor([22, 23])
    assert lowest(slots, sinks, 0, 24).item() == 6  # the oldest new token


def test_ties_keep_the_newer_token() -> None:
    score = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0]])
    assert top(score, 3).tolist() == [[0, 2, 4]]


@pytest.mark.skipif(HAS_KVPRESS, reason="kvpress is installed")
@pytest.mark.parametrize("name", KVPRESS)
def test_a_rule_of_kvpress_is_refused_where_that_is_missing(name: str) -> None:
    with pytest.raises(KVPolicyError, match=r"^--rules: .*evaluate-offline"):
        RULES[name](BUDGET)


@pytest.mark.skipif(not HAS_KVPRESS, reason="kvpress wants another transformers")
@pytest.mark.parametrize("name", KVPRESS)
def test_a_prompt_is_reduced_as_kvpress_reduces_it(
    name: str, path: Path, model: OfflineModel, tokens: list[int]
) -> None:
    import kvpress
    from transformers import AutoModelForCausalLM, DynamicCache

    theirs = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    kind = RULES[name]
    assert issubclass(kind, Press)
    press = getattr(kvpress, kind.press)(1 - BUDGET / PROMPT, **kind.settings)
    cache = DynamicCache()
    with torch.no_grad(), press(theirs):
        theirs(torch.tensor([tokens[:PROMPT]]), past_key_values=cache)
    read = model.prefill(tokens[:PROMPT])
    for (ours,), layer in zip(
        reduce_prompt(model, read, [kind(BUDGET)], PROMPT), cache.layers, strict=True
    ):
        assert ours.k.shape == layer.keys.shape
        # Slots in any order; two keys of one head are nowhere near each other.
        exactly = "donot_use_mm_for_euclid_dist"
        near = torch.cdist(ours.k, layer.keys, compute_mode=exactly).amin(-1)
        torch.testing.assert_close(near, torch.zeros_like(near), atol=1e-3, rtol=0)


# --- runner --------------------------------------------------------------------------


def _tasks() -> dict[str, Task]:
    """A task with a gold answer, and one whose gold is the full cache's answer."""

    def samples(n: int, length: int, seed: int, tokenizer: Any) -> list[Sample]:
        golds = [random_prompt(12, 50 + i) for i in range(n)]
        return [
            Sample(
                i,
                random_prompt(200, i),
                opening=gold[:2],
                free=8,
                forced=(Continuation(gold, 2), Continuation(gold[:7], 2)),
            )
            for i, gold in enumerate(golds)
        ]

    def bare(n: int, length: int, seed: int, tokenizer: Any) -> list[Sample]:
        every = samples(n, length, seed, tokenizer)
        return [Sample(s.index, s.prompt, s.opening, s.free) for s in every]

    def score(sample: Sample, output: Output) -> dict[str, float]:
        nll = output.gold_nll if output.logprobs else 0.0
        return {"score": 1.0, "nll": nll}

    made = [Task("a/gold", samples, score)]
    made += [Task("b/own", bare, score, uses_reference=True, version=2)]
    return {task.name: task for task in made}


def test_runs_are_resumed_and_file_what_the_engine_files(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline_runner, "TASKS", _tasks())
    store = Store(tmp_path / "results.jsonl")
    run = offline_runner.OfflineRunner(str(path), "float32", store, samples=2)
    rules: list[Rule] = [RULES[name](b) for name in ("vote", "h2o") for b in (64, 96)]
    run.run(rules, ["a/gold", "b/own"], 256)
    text = store.path.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == 2 * 2 * (1 + len(rules))
    labels = {(line["policy"], line["budget"]) for line in lines}
    assert labels == {("full (offline)", None), *((r.label, r.budget) for r in rules)}
    for line in lines:
        assert line["score"]["nll"] > 0
        own = line["policy"].startswith("vote")  # filed by the source of the rule
        assert (line["rule"] is not None) == own
        assert line["version"] == (2 if line["task"] == "b/own" else None)
    kept = store.path.with_name("answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in kept] == [0, 1]
    run.run(rules, ["a/gold", "b/own"], 256)
    assert store.path.read_text() == text


def test_every_continuation_is_scored_from_its_own_start(model: OfflineModel) -> None:
    (sample,) = _tasks()["a/gold"].samples(1, 256, 0, None)
    full, vote = answer(model, sample, [Full(1 << 30), VoteRule(64)])
    for output in (full, vote):
        assert [len(found) for found in output.logprobs] == [10, 5]
        assert output.logprobs[0][:5] == pytest.approx(output.logprobs[1], abs=1e-3)
        assert 1 <= len(output.token_ids) <= 8
        assert len(output.free_logprobs) == len(output.token_ids)
