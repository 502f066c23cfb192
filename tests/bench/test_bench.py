"""The benchmarks measure what they say; no test looks at a clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hashevict_vllm.bench import __main__ as command_line
from hashevict_vllm.bench import timing
from hashevict_vllm.bench.results import Results
from hashevict_vllm.bench.rules import RULES, rule_named
from hashevict_vllm.bench.scenarios import SCENARIOS
from hashevict_vllm.config import SCORINGS, KVPolicyConfig


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Run a subcommand in this process; return its JSON."""
    threads = torch.get_num_threads()
    try:
        command_line.main([*arguments, "--output", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    loaded: dict[str, Any] = json.loads((tmp_path / f"{arguments[0]}.json").read_text())
    return loaded


def test_parts_take_turns_at_every_step_and_the_warm_up_does_not_count() -> None:
    order: list[tuple[str, int]] = []
    parts = {name: lambda i, name=name: order.append((name, i)) for name in "ab"}
    seconds = timing.interleaved(parts, repeats=2, steps=2, warm_up=1)
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1)] * 3
    assert {name: len(sample) for name, sample in seconds.items()} == {"a": 2, "b": 2}


def test_ratios_are_of_paired_samples() -> None:
    found = timing.ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert (found.median, found.low, found.high, found.n) == (2.0, 1.5, 2.5, 3)
    assert timing.total([1.0, 2.0], [10.0, 20.0]) == [11.0, 22.0]
    with pytest.raises(ValueError, match="empty"):
        timing.Spread.of([])


def test_every_policy_and_every_rule_of_it_is_measured() -> None:
    named = [KVPolicyConfig.from_dict(rule_named(r) | {"budget": 64}) for r in RULES]
    expected = {(name, rule) for name, rules in SCORINGS.items() for rule in rules}
    assert {(config.name, config.scoring) for config in named} == expected


@pytest.mark.parametrize("rule", list(RULES))
def test_decode_layer_measures_every_rule(tmp_path: Path, rule: str) -> None:
    found = run(
        tmp_path,
        *("decode-layer", "--rules", rule, "--budgets", "512", "--batch", "2"),
        *("--head-dim", "64", "--bits", "64", "--heads", "4/2", "--repeats", "2"),
        *("--length", "1024"),
    )
    (row,) = found["rows"]
    assert row["rule"] == rule
    assert row["seconds"].keys() == {
        *("update 512", "attend 512", "update 1024", "attend 1024"),
        *("evict", "attend evicted", "vote", "evict and vote"),
    }
    assert row["evict_share"]["n"] == row["speedup"]["1024"]["n"] == 2
    assert row["extra"]["median"] < row["evict_share"]["median"]
    assert row["bytes_read"] > 0
    assert (tmp_path / "decode-layer-D64-batch2.png").is_file()


def test_the_parts_of_an_eviction_step_are_timed(tmp_path: Path) -> None:
    small = ("--budgets", "256", "--batch", "2", "--head-dim", "64", "--heads", "4/2")
    instant, vote = run(tmp_path, "evict-parts", *small, "--repeats", "2")["rows"]
    parts = {"stock's update", "hash", "scan", "write"}
    assert instant["seconds"].keys() == parts
    assert vote["seconds"].keys() == parts | {"frame", "ballot"}
    assert {spread["n"] for spread in vote["seconds"].values()} == {2}


def test_caches_larger_than_allowed_are_left_out(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        *("decode-layer", "--rules", "random", "--budgets", "4096", "--batch", "64"),
        *("--max-gib", "0.001"),
    )
    assert found["rows"] == []


def test_prefill_layer_measures_segments(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        *("prefill-layer", "--lengths", "600", "--segments", "128", "prompt"),
        *("--budget", "256", "--chunk", "200", "--head-dim", "64", "--heads", "4/2"),
        *("--repeats", "2"),
    )
    (row,) = found["rows"]
    names = {f"{r} segment={s}" for r in ("vote", "instant") for s in ("128", "prompt")}
    assert row["speedup"].keys() == row["attention_speedup"].keys() == names
    assert row["seconds"].keys() == {"stock", *names}


def test_engines_that_read_prompts_take_turns(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        *("prefill", "--lengths", "300", "700", "--segments", "128", "--layers", "1"),
        *("--budget", "256", "--chunk", "200", "--repeats", "1"),
        *("--stock-up-to", "300"),
    )
    short, long = found["rows"]
    assert short["seconds"].keys() == {"stock", "vote segment=128"}
    assert short["speedup"].keys() == {"vote segment=128"}
    assert long["seconds"].keys() == {"vote segment=128"}
    assert long["speedup"] == {}


def test_engines_decode_step_by_step_in_turn(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        *("steps", "--policies", "streaming_llm", "--requests", "2"),
        *("--prompt", "40", "--output-tokens", "12"),
    )
    stock, again, ours = found["rows"]
    names = [row["engine"] for row in found["rows"]]
    assert names == ["stock", "stock again", "streaming_llm"]
    assert stock["ratio"]["median"] == stock["total"] == 1
    assert {row["ratio"]["n"] for row in (stock, again, ours)} == {12 - 2 - 1}


def test_the_plan_of_a_step_is_timed_beside_stocks(tmp_path: Path, llama: Path) -> None:
    model = ("--model", str(llama), "--segment", "512")
    small = ("--requests", "3", "--chunk", "200", "--budget", "256", "--repeats", "2")
    (row,) = run(tmp_path, "plan", *model, *small)["rows"]
    names = ("decode", "and a chunk", "across segments")
    assert row["seconds"].keys() == {*names, *(f"stock, {name}" for name in names)}
    assert {spread["n"] for spread in row["seconds"].values()} == {2}


def test_a_peer_without_kvpress_is_refused_in_one_sentence(tmp_path: Path) -> None:
    for python in ("/bin/false", sys.executable):
        with pytest.raises(SystemExit, match="--peer-python: ") as refused:
            run(tmp_path, "peer", "--peer-python", python)
        assert str(refused.value).count("\n") == 0


def test_peers_get_the_same_prompts() -> None:
    from hashevict_vllm.bench.peer_worker import prompts

    assert prompts(3, 20, 1000) == prompts(3, 20, 1000)
    assert {len(ids) for ids in prompts(3, 20, 1000)} == {20}


def test_capacity_counts_blocks_as_vllm_does(tmp_path: Path) -> None:
    found = run(tmp_path, "capacity", "--lengths", "8192", "--pool-gib", "4")
    by_cache = {row["cache"]: row for row in found["rows"]}
    stock, fp8 = by_cache["stock"], by_cache["stock fp8"]
    assert stock["bytes_per_request"] == 32 * 2 * 8 * 128 * 2 * 8192
    assert fp8["bytes_per_request"] * 2 == stock["bytes_per_request"]
    eighth = by_cache["instant 12.5%"]
    assert eighth["budget"] == 1024
    assert eighth["requests"] > eighth["requests_while_reading"]
    assert eighth["longest_context"] is None


def test_latency_is_reported_at_doubling_lengths_and_at_the_end() -> None:
    from hashevict_vllm.bench.serve import itl_by_length

    request = [0.001] * 1000 + [0.003] * 1000
    found = itl_by_length([request, request])
    assert list(found) == [256, 512, 1024, 2000 - 128]
    assert found[256] == pytest.approx(1.0)
    assert found[2000 - 128] == pytest.approx(3.0)
    assert itl_by_length([]) == {}


def test_processors_are_read_as_taskset_reads_them() -> None:
    from hashevict_vllm.bench.serve import numbers_of

    assert numbers_of("3") == {3}
    assert numbers_of("0-1,4") == {0, 1, 4}
    with pytest.raises(ValueError):
        numbers_of("all")


def test_stock_cannot_hold_the_tight_load_and_ours_can() -> None:
    load = SCENARIOS["tight"]
    length = load.prompt + load.output
    assert load.pool_tokens < load.in_flight * length
    assert load.in_flight * load.budget <= load.pool_tokens
    ample = SCENARIOS["ample"]
    assert ample.budget >= ample.prompt + ample.output
    assert ample.pool_tokens >= ample.in_flight * (ample.prompt + ample.output)


def test_an_interrupted_run_leaves_whole_json(tmp_path: Path) -> None:
    results = Results(tmp_path, "name", ["name", "--x"])
    results.add({"a": 1})
    results.note("b", 2)
    found = json.loads((tmp_path / "name.json").read_text())
    assert (found["rows"], found["b"], found["command"]) == (
        *([{"a": 1}], 2),
        "scripts/bench name --x",
    )
    assert found["machine"]["cores"]


def test_help_lists_the_subcommands() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "hashevict_vllm.bench", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in command_line.COMMANDS:
        assert name in ran.stdout
