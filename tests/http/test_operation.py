"""A server in operation: under load, watched, and killed in the end.

The tests stand in their order: the last one ends the server.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.models import VOCAB, add_byte_tokenizer, make_llama
from support.monitoring import expressions
from support.server import Server, serve
from support.soak import BUDGETS, FLAGS, MODEL, POLICY, processes, soak
from support.soak_requests import Load

pytestmark = pytest.mark.http

DEAD_WITHIN_S = 60
NOT_YET_THERE: set[str] = set()
"""Metrics that no server has before something happened."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A random model in float32, whose answers can be compared token by token."""
    folder = tmp_path_factory.mktemp("operation")
    model = add_byte_tokenizer(make_llama(folder / "model"))
    flags = [*FLAGS, "--kv-policy", "hashevict", *POLICY]
    with serve(model, *flags, log_path=folder / "log") as running:
        yield running


def test_nothing_leaks_and_answers_are_those_served_alone(server: Server) -> None:
    load = Load(MODEL, (10, VOCAB), prompt=500, output=30, budgets=BUDGETS)
    assert soak(server.url, load, requests=120, in_flight=24, sample=6) == []


def test_every_metric_of_dashboard_alerts_and_scaler_is_exported(
    server: Server,
) -> None:
    text = httpx.get(f"{server.url}/metrics").text
    exported = set(re.findall(r"^((?:vllm|hashevict):\w+)", text, re.M))
    used = {
        name
        for expression in expressions()
        for name in re.findall(r"(?:vllm|hashevict):\w+", expression)
    }
    assert len(used) > 15
    assert used - NOT_YET_THERE <= exported


def ask(tokens: int, **options: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": [20] * 300, "max_tokens": tokens}
    return {**body, "ignore_eos": True, "temperature": 0, **options}


def test_a_stream_ends_with_an_error_and_no_client_hangs_when_the_worker_is_killed(
    server: Server,
) -> None:
    (worker,) = [p for p in processes(server.url) if "Worker" in p.name()]
    start, lines = time.monotonic(), []
    with httpx.stream(
        "POST",
        f"{server.url}/v1/completions",
        json=ask(1500, stream=True),
        timeout=DEAD_WITHIN_S,
    ) as stream:
        try:
            for line in stream.iter_lines():
                lines.append(line)
                if len(lines) == 8:
                    worker.send_signal(signal.SIGKILL)
        except httpx.RemoteProtocolError:
            lines.append("error: the connection was closed")
    # On a busy machine the whole answer may be there before the client reads on.
    whole = any('"finish_reason":"length"' in line for line in lines)
    assert whole or any("error" in line for line in lines[8:])
    assert time.monotonic() - start < DEAD_WITHIN_S
    # Whoever comes now is told as well, until the server is gone.
    deadline = time.monotonic() + DEAD_WITHIN_S
    while time.monotonic() < deadline:
        try:
            answer = httpx.post(
                f"{server.url}/v1/completions", json=ask(4), timeout=DEAD_WITHIN_S
            )
        except httpx.TransportError:
            return
        assert answer.status_code >= 500
        time.sleep(0.2)
    pytest.fail("the server goes on without a worker")
