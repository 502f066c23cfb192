"""The offline evaluation: baselines with exact attention, and oracles of our rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import add_byte_tokenizer, make_llama, random_prompt

from hashevict_vllm.eval.offline import runner as offline_runner
from hashevict_vllm.eval.offline.fidelity import Fidelity, replay
from hashevict_vllm.eval.offline.fidelity_report import write_fidelity
from hashevict_vllm.eval.offline.generate import answer, force, reduce_prompt
from hashevict_vllm.eval.offline.model import OfflineModel, PromptLayer
from hashevict_vllm.eval.offline.rules import RULES, Full, PolicyRule, Rule
from hashevict_vllm.eval.offline.rules.base import PromptOnly, lowest, top
from hashevict_vllm.eval.offline.rules.h2o import H2O, ObservedAttention
from hashevict_vllm.eval.offline.rules.vote import ExactVoteRule, VoteRule
from hashevict_vllm.eval.offline.slots import Slab, Slots
from hashevict_vllm.eval.records import Store
from hashevict_vllm.eval.tasks.base import Continuation, Output, Sample, Task
from hashevict_vllm.policies.reference import ReferenceLayer

PROMPT, STEPS, BUDGET = 300, 40, 128
EVERY = pytest.mark.parametrize("name", list(RULES))


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
    assert kept.index.shape == (2, BUDGET)
    assert (kept.index.diff(dim=1) > 0).all()
    if name != "fastgen":  # not all of its hybrids keep recent tokens of the prompt
        recent = set(range(PROMPT - rule.recent, PROMPT))
        assert all(recent <= set(head.tolist()) for head in kept.index)
    slab = Slab([rule], [kept.slots(prompt.k, prompt.v)], BUDGET, PROMPT)
    generator = torch.Generator().manual_seed(0)
    for t in range(PROMPT, PROMPT + STEPS):
        q = torch.randn(1, 1, 2, 2, 32, generator=generator)
        k, v = torch.randn(2, 1, 1, 2, 32, generator=generator)
        before = slab.position.clone()
        slab.step(q, k, v, t, prompt.scale)
        position = slab.position[0, 0]
        assert position.shape == (2, BUDGET)
        for head, old in zip(position, before[0, 0], strict=True):
            gone = set(old.tolist()) - set(head.tolist())
            assert len(gone) == 1
            assert len(set(head.tolist())) == BUDGET
            assert t in head
            assert rule.sinks <= gone.pop() <= t - 1 - rule.recent


def test_rules_side_by_side_decode_as_each_alone(
    model: OfflineModel, tokens: list[int]
) -> None:
    rules: list[Rule] = [Full(1 << 30)]
    rules += [kind(budget) for budget in (96, BUDGET) for kind in RULES.values()]
    together = _forced(model, tokens, rules)
    for rule, found in zip(rules, together, strict=True):
        alone = _forced(model, tokens, [rule])[0]
        torch.testing.assert_close(found, alone, atol=1e-3, rtol=0)


# --- rules ---------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [BUDGET, PROMPT + 8])
@pytest.mark.parametrize(
    "kind", [VoteRule, *(k for k in RULES.values() if k.__module__.endswith("policy"))]
)
def test_served_policies_decide_as_the_oracle(
    kind: type[PolicyRule], budget: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(PROMPT + STEPS, 4, 32, generator=generator)
    k, v = torch.randn(2, PROMPT + STEPS, 2, 32, generator=generator)
    scale = 32**-0.5
    rule = kind(budget)
    oracle = ReferenceLayer(rule.policy, PROMPT, num_kv_heads=2, head_dim=32)
    oracle.forward(q[:PROMPT], k[:PROMPT], v[:PROMPT], scale)
    none = torch.zeros(PROMPT, dtype=torch.bool)
    layer = PromptLayer(
        q[:PROMPT].transpose(0, 1).unflatten(0, (2, 2)),
        k[:PROMPT].transpose(0, 1),
        v[:PROMPT].transpose(0, 1),
        scale,
        none,
        none,
        lambda positions: (positions, positions),
    )
    kept = rule.keep(layer)
    assert torch.equal(kept.index, oracle.slots.position)
    torch.testing.assert_close(kept.stat, oracle.slots.votes)
    slab = Slab([rule], [kept.slots(layer.k, layer.v)], budget, PROMPT)
    for t in range(PROMPT, PROMPT + STEPS):
        at = slice(t, t + 1)
        expected = oracle.forward(q[at], k[at], v[at], scale)
        found = slab.step(
            q[t].unflatten(0, (2, 2))[None, None], k[None, at], v[None, at], t, scale
        )
        torch.testing.assert_close(found.flatten(0, 3), expected[0])
        live = slab.position[0, 0, :, : slab.n]
        assert torch.equal(live.sort(-1).values, oracle.slots.position)


def test_the_served_engine_answers_as_the_offline_vote(
    path: Path, model: OfflineModel
) -> None:
    """Float32 and one request at a time: only rounding differs."""
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
    index = H2O(BUDGET).keep(prompt).index
    for head in range(2):
        hitters = received[head].topk(BUDGET // 2).indices.sort().values
        assert index[head, : BUDGET // 2].tolist() == hitters.tolist()


def test_prompt_only_rules_give_up_the_prompt_before_new_tokens() -> None:
    position = torch.tensor([0, 1, 2, 3, 7, 8, 20, 21])[None, None]
    stat = torch.tensor([0.0, 0, 0, 0, 2, 1, torch.inf, torch.inf])[None, None]
    empty = torch.empty(1, 1, 8, 0)
    slots = Slots(empty, empty, position, stat, torch.zeros(1, 1))
    sinks = PromptOnly.sinks
    assert lowest(slots, sinks, 0, 22).item() == 5
    stat[..., 4:6] = torch.inf
    assert lowest(slots, sinks, 0, 22).item() == 4
    position[..., 4:6] = torch.tensor([22, 23])
    assert lowest(slots, sinks, 0, 24).item() == 6  # the oldest new token


def test_ties_keep_the_newer_token() -> None:
    score = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0]])
    assert top(score, 3).tolist() == [[0, 2, 4]]


@pytest.mark.parametrize(
    ("name", "press"),
    [
        ("snapkv-press", "SnapKVPress"),
        ("tova", "TOVAPress"),
        ("observed-attention", "ObservedAttentionPress"),
        ("expected-attention", "ExpectedAttentionPress"),
    ],
)
def test_scores_select_what_kvpress_selects(
    name: str, press: str, model: OfflineModel, tokens: list[int]
) -> None:
    """As of kvpress 0.5.5, which wants transformers < 5.3: no extra of ours."""
    kvpress = pytest.importorskip("kvpress")
    seen: dict[int, torch.Tensor] = {}
    layers = model.model.model.layers
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, _, kwargs: seen.update(
                {module.layer_idx: kwargs["hidden_states"]}
            ),
            with_kwargs=True,
        )
        for layer in layers
    ]
    read = model.prefill(tokens[:PROMPT])
    for hook in hooks:
        hook.remove()
    cos, sin = model.rotation(torch.arange(PROMPT))
    for index, layer in enumerate(layers):
        prompt = model.layer(read, index, PROMPT)
        layer.self_attn.rotary_emb = model.model.model.rotary_emb
        with torch.no_grad():
            theirs = getattr(kvpress, press)().score(
                layer.self_attn,
                seen[index],
                prompt.k[None],
                prompt.v[None],
                prompt.everything.flatten(0, 1)[None],
                {"position_embeddings": (cos[None], sin[None])},
            )[0]
        rule = RULES[name](BUDGET)
        ours = rule.judge(prompt)[1]
        if not isinstance(rule, PromptOnly):  # TOVA: the last token is not raised
            theirs, ours = theirs[:, :-1], ours[:, :-1]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
        chosen = theirs.topk(BUDGET, dim=-1).indices.sort(-1).values
        assert torch.equal(top(ours, BUDGET), chosen)
        del layer.self_attn.rotary_emb


def test_observed_attention_is_a_mean_over_the_queries_that_saw_a_token(
    prompt: PromptLayer,
) -> None:
    score = ObservedAttention(BUDGET).score(prompt)
    last = prompt.everything[:, :, -1, -1].mean(1)
    torch.testing.assert_close(score[:, -1], last)


# --- fidelity ------------------------------------------------------------------------


def test_a_replay_of_everything_has_no_error(
    model: OfflineModel, tokens: list[int]
) -> None:
    read = model.prefill(tokens)
    all_of_it = replay(model, read, PROMPT, [VoteRule(PROMPT + STEPS)])
    torch.testing.assert_close(
        all_of_it["error"], torch.zeros(1, 2, 4), atol=1e-4, rtol=0
    )
    for measure in ("mass", "top"):
        torch.testing.assert_close(all_of_it[measure], torch.ones(1, 2, 4))
    part = replay(model, read, PROMPT, [VoteRule(64), ExactVoteRule(64)])
    assert (part["error"] > 0.01).all()
    assert (part["mass"] < 1).all()
    assert (part["top"] >= part["mass"] - 0.2).all()


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
    made += [Task("b/own", bare, score, uses_reference=True)]
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


def test_fidelity_is_measured_once_and_reported(
    model: OfflineModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    from hashevict_vllm.eval.offline import fidelity

    monkeypatch.setattr(fidelity, "TASKS", _tasks())
    kinds = [VoteRule, ExactVoteRule, H2O]
    for _ in range(2):
        measured = Fidelity(model, tmp_path / "fidelity.jsonl")
        measured.run(kinds, [64], ["a/gold", "b/own"], 256, 1, 0, projections=3)
    assert len(measured.records) == 3 + 1 + 1
    report = write_fidelity(measured.records, tmp_path, "command").read_text()
    assert "## 64 tokens" in report
    assert (tmp_path / "fidelity-64.png").stat().st_size > 1000
