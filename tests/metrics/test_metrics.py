"""The metrics of a budget: counted right, and those that docs/metrics.md promises."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from support.engine import engine, greedy, scheduler_of
from support.models import random_prompt

from hashevict_vllm.metrics.counts import Progress, evicted_tokens
from hashevict_vllm.metrics.prometheus import METRICS, PREFIX
from hashevict_vllm.shared import EVICTION_SECONDS

BUDGET = 160
POLICY = {"budget": BUDGET, "segment": 64}
LENGTHS = (20, BUDGET, 333, 700)
OWN = (None, 100, None, None)
"""Budgets that the requests ask for."""

KEPT = (BUDGET, 100, BUDGET, BUDGET)
TOKENS = 50
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def value(name: str, **labels: str) -> float:
    """The sum over the series of a metric that carry the labels."""
    found = [
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == PREFIX + name and labels.items() <= sample.labels.items()
    ]
    assert found, f"no metric {PREFIX}{name} with {labels}"
    return sum(found)


@pytest.fixture(scope="module")
def served(llama: Path) -> Iterator[Any]:
    with engine(llama, POLICY, max_num_seqs=4, disable_log_stats=False) as llm:
        greedy(llm, [random_prompt(length) for length in LENGTHS], TOKENS, OWN)
        yield llm


def test_evictions_are_counted_by_phase(served: Any) -> None:
    # The newest token of an answer has not been written yet.
    written = [length + TOKENS - 1 for length in LENGTHS]
    in_prompt = [max(n - kept, 0) for n, kept in zip(LENGTHS, KEPT, strict=True)]
    lost = [max(n - kept, 0) for n, kept in zip(written, KEPT, strict=True)]
    assert value("written_tokens_total") == sum(written)
    assert value("evicted_tokens_total", phase="prompt") == sum(in_prompt)
    assert value("evicted_tokens_total", phase="output") == sum(lost) - sum(in_prompt)
    assert value("requests_over_budget_total") == 3


def test_seconds_of_eviction_are_those_of_the_worker(served: Any) -> None:
    counted = EVICTION_SECONDS.read(0)
    assert counted is not None
    assert 0 < value("eviction_seconds_total") == counted < time.process_time()


def test_the_capacity_is_that_of_the_pool(served: Any) -> None:
    pool = scheduler_of(served).kv_cache_manager.block_pool
    assert value("capacity_requests") == (pool.num_gpu_blocks - 1) / (BUDGET // 32)


def test_the_kept_ratio_of_every_finished_request_is_observed(served: Any) -> None:
    written = [length + TOKENS - 1 for length in LENGTHS]
    assert value("request_kept_ratio_count") == len(LENGTHS)
    assert value("request_kept_ratio_sum") == pytest.approx(
        sum(min(1, kept / n) for n, kept in zip(written, KEPT, strict=True))
    )
    assert value("request_kept_ratio_bucket", le="0.999") == 3


def test_gauges_fall_to_zero_when_nothing_runs(served: Any) -> None:
    assert value("live_slots") == value("blocks_held") == value("blocks_saved") == 0


def test_the_policy_is_named(served: Any) -> None:
    assert value("info", policy="hashevict", scoring="vote", budget=str(BUDGET)) == 1


def test_gauges_agree_with_the_block_pool_while_requests_run(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hashevict_vllm.metrics.prometheus.REFRESH_S", 0)
    with engine(llama, POLICY, max_num_seqs=4, disable_log_stats=False) as llm:
        manager = scheduler_of(llm).kv_cache_manager
        (budgeted,) = manager.coordinator.single_type_managers
        add_all(llm, LENGTHS, TOKENS)
        seen = 0
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            running = scheduler_of(llm).running
            # Blocks for the next token are taken when its step is planned; scratch goes
            # back then.
            if len(running) == 4 and all(r.num_output_tokens > 2 for r in running):
                seen += 1
                tokens = [r.num_computed_tokens for r in running]
                assert value("live_slots") == sum(min(n, BUDGET) for n in tokens)
                held = sum(len(budgeted.req_to_blocks[r.request_id]) for r in running)
                assert value("blocks_held") == held
                assert value("blocks_saved") == sum(-(-n // 32) for n in tokens) - held
        assert seen > 20


def test_replays_after_a_preemption_are_counted(llama: Path) -> None:
    with engine(llama, POLICY, max_num_seqs=4, disable_log_stats=False) as llm:
        add_all(llm, [100], 200)
        for _ in range(120):
            llm.llm_engine.step()
        scheduler = scheduler_of(llm)
        (request,) = scheduler.running
        generated = request.num_computed_tokens - 100
        scheduler.running.remove(request)
        preempt(scheduler, request)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        assert value("replays_total") == 1
        assert value("replayed_tokens_total") == generated
        # Evicted once as a matter of the request, however often computed.
        assert value("evicted_tokens_total") == 100 + 200 - 1 - BUDGET


def test_without_a_policy_there_is_no_metric_of_it(llama: Path) -> None:
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith(PREFIX):
            REGISTRY.unregister(collector)
    with engine(llama, disable_log_stats=False) as llm:
        greedy(llm, [random_prompt(20)], 5)
    names = {sample.name for metric in REGISTRY.collect() for sample in metric.samples}
    assert not [name for name in names if name.startswith(PREFIX)]


def test_the_documented_table_is_what_is_exported(served: Any) -> None:
    rows = re.findall(
        r"^\| `hashevict:(\w+)` \| (\w+) \| (.*?) ?\| (.*) \|$", DOCS.read_text(), re.M
    )
    documented = {
        name.removesuffix("_total"): (kind, meaning, tuple(re.findall(r"\w+", labels)))
        for name, kind, labels, meaning in rows
    }
    exported = {
        name: (kind.__name__.lower(), meaning, labels)
        for name, (kind, meaning, labels) in METRICS.items()
    }
    assert documented == exported


@pytest.mark.parametrize(
    ("prompt", "tokens", "lost"),
    [(5, 9, (0, 0)), (5, 12, (0, 2)), (14, 14, (4, 0)), (14, 20, (4, 6))],
)
def test_evicted_tokens(prompt: int, tokens: int, lost: tuple[int, int]) -> None:
    assert evicted_tokens(10, prompt, tokens) == lost


def test_the_first_output_of_a_request_counts_its_prompt() -> None:
    first = Progress.of("a", 7, generated=1, new=1, preempted=0)
    then = Progress.of("a", 7, generated=3, new=2, preempted=0)
    assert (first.before, first.after) == (0, 7)
    assert (then.before, then.after) == (7, 9)


def add_all(llm: Any, lengths: Any, tokens: int) -> None:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
    )
    for i, length in enumerate(lengths):
        prompt = {"prompt_token_ids": random_prompt(length)}
        llm.llm_engine.add_request(str(i), prompt, params)


def preempt(scheduler: Any, request: Any) -> None:
    """As ``Scheduler.schedule`` does where blocks are short."""
    import time

    scheduler._preempt_request(request, time.monotonic())
