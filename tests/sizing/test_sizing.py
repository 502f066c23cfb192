"""``hashevict-vllm plan`` says what the engine's own log says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.engine import engine

from hashevict_vllm.sizing.__main__ import main

POOL = 64 << 20
NUMBERS = (
    r"at most (?P<blocks>\d+) blocks .*? once its prompt is read, (?P<peak>\d+) while "
    r"it is\. This pool of (?P<pool>\d+) blocks serves (?P<requests>[\d.]+) requests "
    r"of any length at once, (?P<reading>[\d.]+) while all read long prompts; stock "
    r"vLLM (?P<stock>[\d.]+) of"
)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The plan that the command prints as JSON."""
    capsys.readouterr()
    main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_a_plan_agrees_with_the_log_of_the_engine(
    model: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path: Path = request.getfixturevalue(model)
    said: list[str] = []
    monkeypatch.setattr("hashevict_vllm.cache.capacity.logger.info", said.append)
    sizes = {"kv_cache_memory_bytes": POOL, "max_num_batched_tokens": 1024}
    with engine(path, {"budget": 320, "segment": 512}, **sizes):
        found = re.search(NUMBERS, "".join(said))
    assert found, said
    log = {name: float(value) for name, value in found.groupdict().items()}

    options = ["--pool-gib", str(POOL / 2**30), "--block-size", "32"]
    options += ["--max-model-len", "4096", "--kv-cache-dtype", "float32"]
    options += ["--max-num-batched-tokens", "1024"]
    options += ["--kv-budget", "320", "--kv-policy-config.segment", "512"]
    plan = planned(capsys, str(path), *options)
    (row,) = plan["lengths"]
    assert plan["blocks"] == log["pool"]
    # The log has one or two digits after the point.
    assert row["requests"] == pytest.approx(log["requests"], rel=0.01, abs=0.05)
    assert row["requests_while_reading"] == pytest.approx(
        log["reading"], rel=0.01, abs=0.05
    )
    assert row["stock_requests"] == pytest.approx(log["stock"], rel=0.01, abs=0.005)


def test_requests_within_the_budget_hold_what_they_hold_in_stock_vllm(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--gpu-gib", "80", "--kv-budget", "2048", "--lengths", "2048", "131072"]
    plan = planned(capsys, "llama-3.1-8b", *options)
    short, long = plan["lengths"]
    # 8.03 billion parameters of two bytes.
    assert plan["weight_bytes"] == pytest.approx(2 * 8.03e9, rel=0.001)
    assert short["bytes_per_request"] == long["bytes_per_request"]
    assert short["bytes_per_request"] <= 1.04 * short["stock_bytes_per_request"]
    assert long["against_stock"] == pytest.approx(64, rel=0.05)
    main(["llama-3.1-8b", *options])
    heading, columns, *rows = capsys.readouterr().out.splitlines()
    assert heading.startswith("llama-3.1-8b: a budget of 2,048 tokens per KV head, ")
    assert columns.split()[:2] == ["tokens", "MiB/request"]
    assert [row.split()[0] for row in rows] == ["2,048", "131,072"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["lama-3.1-8b", "--kv-budget", "1k"], "did you mean 'llama-3.1-8b'?"),
        (["llama-3.1-8b"], "--kv-budget: is required"),
        (["llama-3.1-8b", "--kv-policy", "full"], "--kv-budget: is required"),
        (["llama-3.1-8b", "--kv-budget", "20"], "smaller than sinks + recent"),
    ],
)
def test_what_makes_no_plan_is_refused_with_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--pool-gib", "8"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hashevict-vllm plan: error: ")
    assert sentence in line


def test_without_a_home_directory_no_model_is_looked_for_in_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME", "HASHEVICT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match="2"):
        main(["lama-3.1-8b", "--kv-budget", "1k", "--pool-gib", "8"])
    assert "did you mean 'llama-3.1-8b'?" in capsys.readouterr().err
