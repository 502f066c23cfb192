"""The routes under ``/v1/kv_policy``: what they answer, to whom, and how often."""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from support.server import BUDGET, KEY, MODEL, Server

from hashevict_vllm.metrics.prometheus import METRICS, PREFIX

pytestmark = pytest.mark.http

LAYERS, HEADS = 30, 3
FACTS = " ".join(f"Fact {i}: train {i} carried {37 * i} parcels." for i in range(75))


@pytest.fixture
def api(server: Server) -> Any:
    with httpx.Client(
        base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    ) as client:
        yield client


def retention(api: httpx.Client, request_id: str, **query: Any) -> httpx.Response:
    """An answer that is not 429: those are waited out, as a client should."""
    path = f"/v1/kv_policy/requests/{request_id}/retention"
    for _ in range(40):
        answer = api.get(path, params=query)
        if answer.status_code != httpx.codes.TOO_MANY_REQUESTS:
            return answer
        assert int(answer.headers["Retry-After"]) >= 1
        time.sleep(0.2)
    raise AssertionError("only 429")


def stream(client: Any, prompt: Any, **options: Any) -> Any:
    tokens = 400
    extra = {"ignore_eos": True, "min_tokens": tokens}
    return client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=tokens,
        stream=True,
        extra_body=extra,
        **{"temperature": 0, **options},
    )


@contextlib.contextmanager
def live(server: Server, client: Any, prompt: str) -> Iterator[str]:
    """Id of a request that runs until the block ends."""
    with contextlib.closing(stream(client, prompt)) as chunks:
        yield next(chunks).id
    server.wait_until_idle()


def test_the_policy_and_what_it_buys_are_told(api: httpx.Client) -> None:
    found = api.get("/v1/kv_policy").json()
    assert found["policy"]["budget"] == found["effective"]["budget"] == BUDGET
    assert found["effective"]["recent"] == BUDGET // 4
    assert found["layers"] == list(range(LAYERS))
    assert found["capacity"]["blocks"] == BUDGET / found["block_size"]
    assert found["capacity"]["requests"] == pytest.approx(
        found["num_blocks"] / found["capacity"]["blocks"]
    )
    assert found["capacity"]["requests"] > found["capacity"]["stock_requests"]
    assert found["inspect"] is True


def test_the_statistics_are_those_of_the_metrics_page(api: httpx.Client) -> None:
    found = api.get("/v1/kv_policy/stats").json()["metrics"]
    text = api.get("/metrics").text
    assert {name.partition("_total")[0] for name in found} >= set(METRICS) - {
        "request_kept_ratio"
    }
    for name, samples in found.items():
        for sample in samples:
            lines = [x for x in text.splitlines() if x.startswith(f"{PREFIX}{name}{{")]
            series = [
                line
                for line in lines
                if all(f'{k}="{v}"' in line for k, v in sample["labels"].items())
            ]
            assert float(series[0].rpartition(" ")[2]) == sample["value"]


def test_the_routes_stand_in_openapi(api: httpx.Client) -> None:
    paths = api.get("/openapi.json").json()["paths"]
    assert {path for path in paths if "kv_policy" in path} == {
        "/v1/kv_policy",
        "/v1/kv_policy/stats",
        "/v1/kv_policy/requests/{request_id}/retention",
    }


@pytest.mark.parametrize("path", ["", "/stats", "/requests/cmpl-x/retention", "/ui"])
def test_without_the_key_there_is_nothing_to_see(server: Server, path: str) -> None:
    assert httpx.get(f"{server.url}/v1/kv_policy{path}").status_code == 401


def test_a_live_requests_retention_tells_what_every_head_keeps(
    api: httpx.Client, server: Server, client: Any
) -> None:
    with live(server, client, FACTS) as request_id:
        found = retention(api, request_id, columns=10_000, include=["bitmap", "slots"])
    found = found.json()
    assert found["budget"] == found["live_slots"] == BUDGET
    assert found["tokens"] >= found["prompt_tokens"] > BUDGET + 100
    assert found["blocks"] * 128 == BUDGET
    assert (found["width"], found["stop"]) == (1, found["tokens"])
    assert [len(found["layers"]), *set(found["kv_heads"])] == [LAYERS, HEADS]
    for held, bits in zip(found["held"], found["bitmaps"], strict=True):
        rows = np.frombuffer(base64.b64decode(bits), "u1").reshape(HEADS, -1)
        mask = np.unpackbits(rows, axis=1)[:, : found["tokens"]]
        assert mask.sum(1).tolist() == [BUDGET] * HEADS
        assert mask.sum(0).tolist() == held
        assert held[:4] == [HEADS] * 4  # sinks
    assert all(slots["votes"] for slots in found["slots"])


def test_a_live_requests_retention_is_read_again_and_a_finished_ones_is_not(
    api: httpx.Client, server: Server, client: Any
) -> None:
    # Small reads: a busy machine may leave a client that computes without a core until
    # its stream has ended. Another stream is asked then, at most twice.
    for _ in range(3):
        with live(server, client, FACTS) as request_id:
            first = retention(api, request_id, layers="0", columns=1)
            second = retention(api, request_id, layers="3,7-8", start=5, columns=100)
        gone = retention(api, request_id)
        assert gone.status_code == 404
        assert "has finished" in gone.json()["error"]["message"]
        if second.status_code == httpx.codes.OK:
            break
    later = second.json()
    assert later["layers"] == [3, 7, 8]
    assert later["tokens"] > first.json()["tokens"] > BUDGET + 100
    assert len(later["held"][0]) <= 100
    assert later["slots"] is later["bitmaps"] is None


def test_ids_lead_to_their_own_request_alone(
    api: httpx.Client, server: Server, client: Any
) -> None:
    """Also where one client's id begins as another's, and with several answers."""
    headers = {"X-Request-Id": "mine"}
    mine = stream(
        client, [FACTS, "Once upon"], n=2, temperature=1, extra_headers=headers
    )
    theirs = stream(client, "A", extra_headers={"X-Request-Id": "mine-0"})
    assert next(mine).id == "cmpl-mine"
    assert next(theirs).id == "cmpl-mine-0"
    tokens = {
        (prompt, choice): retention(api, "cmpl-mine", prompt=prompt, choice=choice)
        for prompt in (0, 1)
        for choice in (0, 1)
    }
    assert tokens[0, 0].json()["prompt_tokens"] == tokens[0, 1].json()["prompt_tokens"]
    assert tokens[1, 0].json()["prompt_tokens"] == 2
    assert retention(api, "cmpl-mine-0").json()["prompt_tokens"] == 1
    for wrong in ("cmpl-", "cmpl-min", "cmpl-mine-1", "mine", "0_cmpl-mine-0", "cmpl"):
        assert retention(api, wrong).status_code == 404, wrong
    for query in ({"prompt": 2}, {"choice": 2}):
        assert retention(api, "cmpl-mine", **query).status_code == 404
    for chunks in (mine, theirs):
        chunks.close()
    server.wait_until_idle()


def test_questions_that_make_no_sense_or_come_too_often_are_refused(
    api: httpx.Client, server: Server, client: Any
) -> None:
    with live(server, client, "Once upon a time") as request_id:
        path = f"/v1/kv_policy/requests/{request_id}/retention"
        for query in (
            {"columns": 0},
            {"start": -1},
            {"layers": "a"},
            {"include": "keys"},
        ):
            answer = api.get(path, params=query)
            assert answer.status_code == 400, query
            assert next(iter(query)) in answer.json()["error"]["message"]
        assert retention(api, request_id).status_code == 200
        early = api.get(path)
        assert early.status_code == 429
        assert early.headers["Retry-After"] == "1"
        assert early.json()["error"]["message"].startswith(
            "Retention is read elsewhere"
        )
