#!/usr/bin/env python3
"""One long chat under stock vLLM, a budget of 25 % and one of 10 %.

What does a smaller cache do to the answers, and which tokens does it keep? A sailor
pastes a logbook of 2,600 tokens and asks about it, turn by turn; every server answers
the same questions. While the last answer streams, the server is asked what its cache
still holds.

    pip install '.[cpu,model,eval]'       # in a clone; see docs/serve.md
    python docs/examples/retention.py     # writes build/retention.md and retention.png

Takes some minutes on one core: three servers start, one after the other.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai

from hashevict_vllm.bench.server import Server, serve
from hashevict_vllm.models import fetch_default_model

LENGTH = 4096
SETTINGS = {"stock": None, "25 %": "25%", "10 %": "10%"}
ANSWER = 60
READ_AFTER = 20
"""Tokens of the last answer after which retention is read."""

COLUMNS = 192
"""Into which positions are added up."""

# -- 1. The chat ---------------------------------------------------------------------

WINDS = ["north", "east", "south", "west", "north-east", "south-west", "south-east"]
DISHES = ("pea soup", "fresh bread", "fish", "rice pudding", "onion stew", "pancakes")
SIGHTS = ("a whale", "two gulls", "an island", "a wreck", "a lighthouse", "nothing")
TREASURE = "Day 31: we bury the silver key under the third palm tree of Parrot Bay."


def logbook(days: int = 88) -> str:
    """Entries alike, but for one."""
    entries = [
        f"Day {day}: wind from the {WINDS[day * 3 % 7]}, {80 + day * 37 % 90} miles; "
        f"the cook makes {DISHES[day * 5 % 6]}, and we see {SIGHTS[day * 7 % 6]}."
        for day in range(1, days + 1)
    ]
    entries[30] = TREASURE
    return "\n".join(entries)


QUESTIONS = (
    f"This is my logbook.\n\n{logbook()}\n\nWhere from was the wind on day 88?",
    "What is a logbook good for? One sentence.",
    "What did we bury, and where?",
    "Write a short poem about our voyage.",
)


# -- 2. Ask a server, and read what it keeps -----------------------------------------


@dataclass
class Chat:
    """What one setting made of the chat.

    Attributes:
        answers: One per question.
        share: By layer and column, the share of heads that hold its positions, as a
            mean; None for stock.
        edges: Positions at which columns begin, and the end of the last one.
        starts: Position at which each question begins in the last prompt.
        treasure: Position at which `TREASURE` begins.

    """

    answers: list[str] = field(default_factory=list)
    share: np.ndarray | None = None
    edges: np.ndarray | None = None
    starts: list[int] = field(default_factory=list)
    treasure: int = 0


def hold(server: Server, model: str, inspect: bool) -> Chat:
    """Ask every question, with what was said before."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    chat, said = Chat(), list[Any]()
    before = QUESTIONS[0].partition(TREASURE)[0]
    chat.treasure = count_tokens(server, model, [{"role": "user", "content": before}])
    for question in QUESTIONS:
        chat.starts.append(count_tokens(server, model, said) if said else 0)
        said.append({"role": "user", "content": question})
        stream: Any = client.chat.completions.create(
            model=model, messages=said, max_tokens=ANSWER, temperature=0, stream=True
        )
        text = ""
        for number, chunk in enumerate(stream):
            text += chunk.choices[0].delta.content or ""
            if inspect and question is QUESTIONS[-1] and number == READ_AFTER:
                chat.share, chat.edges = read(server, chunk.id)
        said.append({"role": "assistant", "content": text})
        chat.answers.append(text)
    if inspect and chat.share is None:
        raise SystemExit(f"the last answer had fewer than {READ_AFTER} tokens")
    return chat


def count_tokens(server: Server, model: str, said: list[dict[str, str]]) -> int:
    """Tokens of what was said, as the model's template writes it."""
    body = {"model": model, "messages": said, "add_generation_prompt": False}
    answer = httpx.post(f"{server.url}/tokenize", json=body, timeout=60)
    return int(answer.raise_for_status().json()["count"])


def read(server: Server, request_id: str) -> tuple[np.ndarray, np.ndarray]:
    """What a live request holds, as `Chat.share` and `Chat.edges`."""
    answer = httpx.get(
        f"{server.url}/v1/kv_policy/requests/{request_id}/retention",
        params={"columns": COLUMNS},
        timeout=60,
    )
    found: dict[str, Any] = answer.raise_for_status().json()
    begins = np.arange(found["start"], found["stop"], found["width"])
    edges = np.append(begins, found["stop"])
    heads = np.array(found["kv_heads"])[:, None]
    return np.array(found["held"]) / (heads * np.diff(edges)), edges


# -- 3. Show ---------------------------------------------------------------------------

ABOVE = {"textcoords": "offset points", "fontsize": 9, "color": "tab:blue"}
"""Of a word above a map's upper edge."""


def plot(chats: dict[str, Chat], path: Path) -> None:
    """A map for each budget, and below how many heads hold a position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {name: chat for name, chat in chats.items() if chat.share is not None}
    figure, axes = pyplot.subplots(
        len(shown) + 1, figsize=(9, 2.2 * (len(shown) + 1)), layout="constrained"
    )
    for axis, (name, chat) in zip(axes, shown.items(), strict=False):
        assert chat.share is not None
        assert chat.edges is not None
        layers = np.arange(len(chat.share) + 1)
        axis.pcolormesh(chat.edges, layers, chat.share, cmap="Greens", vmin=0, vmax=1)
        axis.set_title(f"Budget {name} of {LENGTH:,} tokens", loc="left")
        axis.set_ylabel("layer")
        axis.invert_yaxis()
        for start in chat.starts[1:]:
            axis.axvline(start, color="tab:orange", linewidth=1.5)
        axis.annotate("the silver key", (chat.treasure, 0), (0, 3), **ABOVE)
        kept = 100 * chat.share.mean(0)
        axes[-1].stairs(kept, chat.edges, baseline=None, label=f"budget {name}")
    axes[-1].set(xlabel="position (orange: a new question)", ylabel="% of heads")
    axes[-1].set_title("Heads that still hold a position", loc="left")
    axes[-1].set_ylim(0, 103)
    axes[-1].margins(x=0)
    axes[-1].legend(loc="upper center")
    figure.savefig(path, dpi=100)


def tell(chats: dict[str, Chat], path: Path) -> None:
    """The answers beside each other, as Markdown."""
    lines = [
        "# One chat, three budgets",
        "",
        "Written by `docs/examples/retention.py` (SmolLM2-135M-Instruct, bfloat16,",
        f"greedy, `--max-model-len {LENGTH}`); answers are cut at {ANSWER} tokens.",
        "",
        "![Which positions are kept](retention.png)",
    ]
    for number, question in enumerate(QUESTIONS):
        lines += ["", f"**{question.splitlines()[-1]}**", ""]
        for name, chat in chats.items():
            lines.append(f"- {name}: {' '.join(chat.answers[number].split())}")
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run all settings, one server at a time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=Path("build"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    model = options.model or fetch_default_model()
    chats = {}
    for name, budget in SETTINGS.items():
        flags = [
            "--max-model-len",
            str(LENGTH),
            "--dtype",
            "bfloat16",
            "--enforce-eager",
        ]
        if budget:
            flags += ["--kv-policy", "hashevict", "--kv-budget", budget]
            flags += ["--kv-policy-config.inspect", "true"]
        log = options.output / "retention.log"
        with serve(model, flags, log, {"VLLM_CPU_KVCACHE_SPACE": "1"}) as server:
            chats[name] = hold(server, str(model), inspect=budget is not None)
        log.unlink()
        print(f"{name}: {chats[name].answers[2]}", flush=True)
    plot(chats, options.output / "retention.png")
    tell(chats, options.output / "retention.md")


if __name__ == "__main__":
    main()
