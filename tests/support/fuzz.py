"""schemathesis over the completion routes of a server, our fields among them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import httpx
import hypothesis
import schemathesis
from hypothesis import strategies as st

VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Once upon a time"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
}
"""The routes, and what each of them serves."""

TOKENS = 8
"""Most tokens of an answer: valid requests are not what is looked for."""

PATIENCE_S = 60

kv_budgets = st.one_of(
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["full", "Full", "25%", "1k", "-1", "0", "1e3", "９９"]),
    st.none(),
    st.booleans(),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)
"""What a client may send as ``vllm_xargs.kv_budget``; most is nonsense."""


def fuzz(url: str, model: str, examples: int) -> list[str]:
    """Send requests made from the server's own OpenAPI, half of them malformed.

    Args:
        url: The server.
        model: Its served name: under another, each would be a 404.
        examples: Requests of each route.

    Returns:
        What was wrong, one sentence each: a status of 500 or more, no answer in time,
        or another answer to the same question afterwards.

    """
    question = {"model": model, "prompt": "Once upon a time", "max_tokens": 16}
    question |= {"temperature": 0, "ignore_eos": True}
    before = _text(url, question)
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    wrong: list[str] = []
    for route in VALID:
        seen = _fuzz_route(url, schema[route]["POST"], route, model, examples, wrong)
        print(f"{route}: {dict(sorted(seen.items()))}", flush=True)
    if _text(url, question) != before:
        wrong.append("another answer to the same question after the malformed ones")
    return wrong


def _text(url: str, question: dict[str, Any]) -> str:
    answer = httpx.post(f"{url}/v1/completions", json=question, timeout=PATIENCE_S)
    answer.raise_for_status()
    return answer.json()["choices"][0]["text"]


def _fuzz_route(
    url: str, operation: Any, route: str, model: str, examples: int, wrong: list[str]
) -> Counter[int]:
    """Requests of one route; statuses by how often they came."""
    seen: Counter[int] = Counter()
    both = operation.as_strategy() | operation.as_strategy(
        generation_mode=schemathesis.GenerationMode.NEGATIVE
    )

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.seed(0)
    @hypothesis.given(
        case=both, budget=kv_budgets, kept=st.integers(0, 4), draw=st.randoms()
    )
    def send(case: Any, budget: Any, kept: int, draw: Any) -> None:
        body = case.body
        if isinstance(body, dict):
            # A few of the generated fields in a request that is served without them:
            # taken together they are nearly always refused for the first of them.
            if kept < 4:
                chosen = draw.sample(sorted(body), min(kept, len(body)))
                body = {**VALID[route], **{name: body[name] for name in chosen}}
            if draw.random() < 0.3:
                body["vllm_xargs"] = {"kv_budget": budget}
            body = {**body, "model": model, "max_tokens": TOKENS, "n": 1}
            body.pop("max_completion_tokens", None)
            body.pop("best_of", None)
        try:
            status = httpx.post(f"{url}{route}", json=body, timeout=PATIENCE_S)
        except (ValueError, TypeError):
            return  # not JSON (NaN, lone surrogates): no client could send it either
        except httpx.HTTPError as error:
            wrong.append(f"{route}: {type(error).__name__} on {str(body)[:300]}")
            return
        seen[status.status_code] += 1
        if status.status_code >= 500:
            wrong.append(f"{route}: {status.status_code} on {str(body)[:300]}")

    send()
    return seen
