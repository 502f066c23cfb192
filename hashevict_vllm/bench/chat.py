"""A client of chats: every turn's prompt is all that was said before, and more."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from hashevict_vllm.bench.server import Server

FIRST_WORD = 100
"""Token ids below are a tokenizer's special ones."""


@dataclass(frozen=True)
class Turn:
    """One request of a chat.

    Attributes:
        number: Of the turn, from 0.
        ttft: Seconds to the first token.
        gaps: Seconds between later tokens.
        cached: Tokens that the server says it had cached.

    """

    number: int
    ttft: float
    gaps: list[float]
    cached: int


def run_client(
    server: Server,
    model: Path,
    turns: tuple[int, ...],
    output: int,
    chats: int,
    in_flight: int,
    seed: int,
) -> dict[str, Any]:
    """Hold chats with a server.

    Args:
        server: The server.
        model: Of the server.
        turns: Tokens that each turn adds to what was said.
        output: Tokens of every reply.
        chats: Number of chats.
        in_flight: Chats at a time.
        seed: Of the text; another makes chats that no cache knows.

    Returns:
        Medians of the first and of later turns' time to the first token
        (``ttft_ms``, ``later_ttft_ms``), latencies between tokens, output tokens per
        second, tokens cached per later turn, and ``itls`` of every turn.

    """
    size = json.loads((model / "config.json").read_text())["vocab_size"]

    def hold(number: int) -> list[Turn]:
        words = random.Random(f"{seed} {number}")
        said: list[int] = []
        found = []
        for turn, count in enumerate(turns):
            said += [words.randrange(FIRST_WORD, size) for _ in range(count)]
            found.append(_ask(server, model, said, output, turn))
            # What the model says is not needed: any reply is as long.
            said += [words.randrange(FIRST_WORD, size) for _ in range(output)]
        return found

    start = time.perf_counter()
    with ThreadPoolExecutor(in_flight) as pool:
        held = [turn for chat in pool.map(hold, range(chats)) for turn in chat]
    seconds = time.perf_counter() - start
    later = [turn for turn in held if turn.number] or held
    gaps = sorted(gap for turn in held for gap in turn.gaps)
    return {
        "throughput": len(held) * output / seconds,
        "ttft_ms": 1e3 * statistics.median(t.ttft for t in held if not t.number),
        "later_ttft_ms": 1e3 * statistics.median(turn.ttft for turn in later),
        "cached_tokens": statistics.fmean(turn.cached for turn in later),
        **{
            f"itl_p{share}_ms": 1e3 * gaps[(len(gaps) - 1) * share // 100]
            for share in (50, 95, 99)
        },
        "itls": [turn.gaps for turn in held],
    }


def _ask(server: Server, model: Path, said: list[int], output: int, turn: int) -> Turn:
    """One streamed completion."""
    body = {
        "model": str(model),
        "prompt": said,
        "max_tokens": output,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    start, times, cached = time.perf_counter(), [], 0
    for chunk in events(request):
        if chunk.get("choices"):
            times.append(time.perf_counter())
        if usage := chunk.get("usage"):
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    if not times:
        raise RuntimeError("the server streamed no token")
    gaps = [later - sooner for sooner, later in pairwise(times)]
    return Turn(turn, times[0] - start, gaps, cached)


def events(request: Request) -> Iterator[dict[str, Any]]:
    """Chunks of a stream of server-sent events."""
    with urlopen(request) as stream:
        for line in stream:
            text = line.decode().strip()
            if text.startswith("data: ") and text != "data: [DONE]":
                yield json.loads(text.removeprefix("data: "))
