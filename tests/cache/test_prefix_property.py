"""Prefix caching under random schedules: pages hold what hashes and requests expect."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from support.paper_worker import PaperEngine, fork

from hashevict_vllm import plugin, resolved
from hashevict_vllm.resolved import UNBOUNDED, ResolvedKVPolicy

plugin.register()

from vllm.config.kv_events import KVEventsConfig  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402

N = 4
LONGEST = 96
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}


def policy_of(budget: int, segment: int, **changes: Any) -> ResolvedKVPolicy:
    numbers: dict[str, Any] = {"sinks": 3, "recent": 4, "window": 3, "vote_every": 4}
    return ResolvedKVPolicy(
        name="hashevict",
        budget=budget,
        scoring="vote",
        hash_bits=32,
        hash_source="query",
        orthogonal=True,
        segment=segment,
        seed=0,
        pool=3,
        value_weight=64.0,
        value_votes=2.0,
        decay=0.9,
        **{**numbers, **changes},
    )


POLICIES = {
    "segments": policy_of(22, 8),
    "budget of whole blocks": policy_of(24, 12),
    "one segment": policy_of(22, 96),
    "token by token": policy_of(22, 1),
    "more sinks than a block": policy_of(26, 16, sinks=9, recent=5),
    "window of a segment": policy_of(18, 8, window=8),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config")
    (path / "config.json").write_text(json.dumps(LLAMA))
    return path


@pytest.fixture(autouse=True)
def short_horizon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some requests stay below the budgets of these tests without a vote."""
    monkeypatch.setattr(resolved, "VOTE_HORIZON", 10)


def paper_engine(
    model: Path,
    policy: ResolvedKVPolicy,
    blocks: int,
    chunk: int,
    lag: int = 0,
    budgets: tuple[int | None, ...] = (None,),
    **options: Any,
) -> PaperEngine:
    config = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        max_model_len=LONGEST + 32,
        max_num_batched_tokens=chunk,
        max_num_seqs=6,
        scheduling_policy="priority",
        enable_prefix_caching=True,
        async_scheduling=bool(lag),
        **options,
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    ).create_engine_config()
    return PaperEngine(config, policy, N, blocks, lag, budgets)


@pytest.mark.parametrize("lag", [0, 1], ids=["in step", "async"])
@pytest.mark.parametrize("name", POLICIES)
def test_pages_hold_what_prefixes_make_whatever_the_schedule(
    name: str, lag: int, model: Path
) -> None:
    """In the latter seeds some requests ask for a budget of their own."""
    policy = POLICIES[name]
    hits = fresh = 0
    for seed in range(6):
        rng = random.Random(seed)
        most = policy.budget + policy.segment if policy.segment > 1 else policy.budget
        budgets: tuple[int | None, ...] = (None,)
        if seed >= 3:
            budgets, most = (None, policy.budget - 4, UNBOUNDED), LONGEST + 32
        floor = -(-min(most, LONGEST + 32) // N) + 1
        blocks, chunk = floor + rng.randint(0, 30), rng.choice((16, 40, 128))
        engine = paper_engine(model, policy, blocks, chunk, lag, budgets)
        run_random_schedule(engine, rng)
        hits += sum(engine.hits.values())
        fresh += engine.preempted_fresh
        assert_forgotten(engine)
    assert hits > 300


def assert_forgotten(engine: PaperEngine) -> None:
    """No block leaks, and no request is remembered."""
    assert engine.pool.get_num_free_blocks() == engine.num_blocks - 1
    kept = {
        name: value
        for name, value in vars(engine.manager).items()
        if isinstance(value, (dict, set)) and value
    }
    assert not kept
    assert not engine.manager._ledger.fresh | engine.manager._ledger.private


def test_a_preemption_in_the_step_that_hashed_leaves_nothing_under_a_hash(
    model: Path,
) -> None:
    """The less urgent request is planned first, then gives way to the other."""
    options = {"long_prefill_token_threshold": 8, "scheduler_reserve_full_isl": False}
    engine = paper_engine(model, POLICIES["one segment"], 11, 16, **options)
    engine.add("less", [1] * 30, 6, priority=1)
    engine.step()
    engine.add("more", [2] * 8, 6, priority=0)
    for _ in range(50):
        engine.step()
        if not engine.unfinished:
            break
    assert not engine.unfinished
    assert engine.preempted_fresh > 0
    assert_forgotten(engine)


def test_an_abort_between_vote_and_reduction_leaves_a_prefix_that_can_be_hit(
    model: Path,
) -> None:
    engine = paper_engine(model, POLICIES["one segment"], 60, 13)
    prompt = list(range(1, 41))  # the fourth step would read one token, and reduce
    engine.add("gone", prompt, 4)
    for _ in range(3):
        engine.step()
    assert engine.rows["gone"].done == 39
    engine.abort("gone")
    engine.add("again", prompt, 4)
    while engine.unfinished:
        engine.step()
    engine.step()
    assert engine.hits["again"] == 36
    assert list(engine.requests["again"].output_token_ids) == engine.answer(prompt, 4)
    assert_forgotten(engine)


def run_random_schedule(engine: PaperEngine, rng: random.Random) -> None:
    known: list[list[int]] = []
    wanted: dict[str, tuple[list[int], int]] = {}
    for step in range(260):
        if step < 200 and rng.random() < 0.5 and len(engine.unfinished) < 9:
            name, prompt = f"r{len(wanted)}", fork(rng, known, LONGEST)
            wanted[name] = (prompt, rng.randint(1, 16))
            budget = rng.choice(engine.budgets)
            engine.add(name, *wanted[name], rng.randint(0, 2), budget)
            known.append(prompt)
        if engine.unfinished and rng.random() < 0.03:
            gone = rng.choice(engine.unfinished)
            wanted.pop(gone)
            wanted[f"{gone} aborted"] = ([], 0)
            engine.abort(gone)
        if rng.random() < 0.01:
            engine.scheduler.reset_prefix_cache(rng.random() < 0.5)
        before = set(engine.unfinished)
        engine.step()
        known += [engine.tokens[name] for name in before - set(engine.unfinished)]
    for _ in range(3000):
        if not engine.unfinished:
            break
        engine.step()
    engine.step()
    assert not engine.unfinished
    for name, (prompt, count) in wanted.items():
        if prompt:
            output = list(engine.requests[name].output_token_ids)
            assert output == engine.answer(prompt, count)
