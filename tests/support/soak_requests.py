"""Requests at random: lengths, streaming, and how each of them ends."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

FATES = {"finish": 70, "disconnect": 15, "timeout": 15}
"""How clients leave, and of a hundred how many: with their answer, after some chunks of
a stream, or after some tenths of a second."""

HANG_S = 120
"""A request that takes longer counts as one that hangs."""

SHARED = 200
"""Tokens with which a part of the prompts begin, so that prefixes are cached."""


@dataclass(frozen=True)
class Load:
    """What requests are drawn from.

    Attributes:
        model: The served name.
        vocabulary: Token ids that prompts consist of, [first, end).
        prompt: Most tokens of a prompt.
        output: Most tokens of an answer.
        budgets: Values of ``kv_budget`` to draw from; for None a request brings none.
        seed: Of everything.

    """

    model: str
    vocabulary: tuple[int, int]
    prompt: int
    output: int
    budgets: Sequence[int | str | None] = ()
    seed: int = 0

    def request(self, number: int) -> Request:
        """The request of a number, always the same."""
        draw = random.Random(f"{self.seed} {number}")
        length = draw.randint(1, self.prompt)
        words = [draw.randrange(*self.vocabulary) for _ in range(length)]
        if draw.random() < 0.3:
            shared = random.Random(self.seed)
            words[:SHARED] = [
                shared.randrange(*self.vocabulary) for _ in words[:SHARED]
            ]
        fate = draw.choices(list(FATES), list(FATES.values()))[0]
        body = {
            "model": self.model,
            "prompt": words,
            "max_tokens": draw.randint(1, self.output),
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": fate == "disconnect" or draw.random() < 0.4,
            "temperature": 0,
        }
        if fate != "finish":
            body["max_tokens"] = 4 * self.output
        elif draw.random() < 0.2:
            body |= {"temperature": 1, "seed": number}
        elif draw.random() < 0.1:
            body |= {"n": 2, "temperature": 1, "seed": number}
        budget = draw.choice(list(self.budgets) or [None])
        if budget is not None:
            body["vllm_xargs"] = {"kv_budget": budget}
        return Request(
            number, fate, body, chunks=draw.randint(1, 8), seconds=draw.uniform(0.05, 2)
        )


@dataclass(frozen=True)
class Request:
    """One request and how its client leaves.

    Attributes:
        number: Of the request.
        fate: One of `FATES`.
        body: JSON of ``/v1/completions``.
        chunks: Chunks after which a ``disconnect`` closes.
        seconds: After which a ``timeout`` closes.

    """

    number: int
    fate: str
    body: dict[str, Any]
    chunks: int
    seconds: float

    @property
    def can_be_compared(self) -> bool:
        """Whether its answer is a matter of the request alone."""
        return self.fate == "finish" and self.body["temperature"] == 0


@dataclass
class Answer:
    """What became of a request.

    Attributes:
        request: The request.
        tokens: Ids of the first choice.
        error: What went wrong; empty if nothing did.

    """

    request: Request
    tokens: list[int] = field(default_factory=list)
    error: str = ""


async def send(client: httpx.AsyncClient, request: Request) -> Answer:
    """Send a request, leave as it says, and note what was wrong."""
    answer = Answer(request)
    patience = request.seconds if request.fate == "timeout" else HANG_S
    try:
        async with asyncio.timeout(patience):
            await (_stream if request.body["stream"] else _whole)(client, answer)
    except TimeoutError:
        if request.fate != "timeout":
            answer.error = f"no answer after {patience} s"
        return answer
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
        return answer
    wanted = request.body["max_tokens"]
    if not answer.error and request.fate == "finish" and len(answer.tokens) != wanted:
        answer.error = f"{len(answer.tokens)} tokens instead of {wanted}"
    return answer


async def _whole(client: httpx.AsyncClient, answer: Answer) -> None:
    response = await client.post("/v1/completions", json=answer.request.body)
    if response.status_code != 200:
        answer.error = f"status {response.status_code}: {response.text[:200]}"
        return
    answer.tokens = response.json()["choices"][0]["token_ids"]


async def _stream(client: httpx.AsyncClient, answer: Answer) -> None:
    request, chunks = answer.request, 0
    async with client.stream("POST", "/v1/completions", json=request.body) as response:
        if response.status_code != 200:
            answer.error = f"status {response.status_code}"
            return
        async for event in _events(response):
            if "error" in event:
                answer.error = f"in the stream: {event['error']}"
                return
            for choice in event["choices"]:
                if choice["index"] == 0:
                    answer.tokens += choice.get("token_ids") or []
            chunks += 1
            if request.fate == "disconnect" and chunks >= request.chunks:
                return


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Events of a stream; httpx's own lines end at any line break of Unicode."""
    rest = b""
    async for part in response.aiter_bytes():
        *whole, rest = (rest + part).split(b"\n\n")
        for text in whole:
            if text != b"data: [DONE]":
                yield json.loads(text.removeprefix(b"data: "))


async def send_all(
    url: str, requests: Sequence[Request], in_flight: int
) -> list[Answer]:
    """Send requests, so many at a time."""
    places = asyncio.Semaphore(in_flight)
    limits = httpx.Limits(max_connections=in_flight, max_keepalive_connections=0)

    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=HANG_S) as client:

        async def one(request: Request) -> Answer:
            async with places:
                return await send(client, request)

        return await asyncio.gather(*map(one, requests))
