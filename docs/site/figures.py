"""Draws the figures of docs/how-it-works.md, from the code that they are about.

    python docs/site/figures.py     # writes docs/figures/*.svg

tests/docs compares what is committed with what this draws.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from svg import BLUE, GREEN, GREY, INK, ORANGE, PALE, Card

from hashevict_vllm.cache.page import WORD_BYTES, tail_bytes
from hashevict_vllm.config import KVPolicyConfig
from hashevict_vllm.plan import occupied_slots
from hashevict_vllm.policies import make_rule

FIGURES = Path(__file__).resolve().parents[1] / "figures"

BUDGET, PROMPT, OUTPUT, LONGEST = 1024, 10_000, 2_000, 32_768
BLOCK, HEAD_DIM, ELEMENT_BYTES = 128, 128, 2
POLICY = KVPolicyConfig.from_dict({"name": "hashevict", "budget": BUDGET}).resolve(
    LONGEST, BLOCK
)


def slots() -> Card:
    """Slots of one request while its prompt is read and its answer is written."""
    card = Card(720, 300, "Tokens held per KV head, stock vLLM and a budget of 1,024")
    left, bottom, width, height = 70, 250, 620, 215
    whole = PROMPT + OUTPUT

    def at(tokens: int, held: int) -> tuple[float, float]:
        return left + width * tokens / whole, bottom - height * held / whole

    def held(tokens: int) -> int:
        return occupied_slots(POLICY, tokens, PROMPT)

    ours = [at(0, 0)]
    for tokens in range(1, whole + 1):
        if held(tokens) < held(tokens - 1):  # what it holds just before it is reduced
            ours.append(at(tokens, held(tokens - 1) + 1))
        if tokens % 50 == 0 or held(tokens) != held(tokens - 1) + 1:
            ours.append(at(tokens, held(tokens)))
    for value in (0, BUDGET, BUDGET + POLICY.segment, whole):
        y = at(0, value)[1]
        card.path([(left, y), (left + width, y)], GREY, 1)
        card.text(left - 8, y + 4, f"{value:,}", PALE, "end")
    edge = at(PROMPT, 0)[0]
    card.path([(edge, bottom - height), (edge, bottom)], GREY, 1)
    card.path([at(0, 0), at(whole, whole)], ORANGE, 2)
    card.path(_straight(ours), BLUE, 2.5)
    card.text(left + width - 8, at(0, whole)[1] + 40, "stock vLLM", ORANGE, "end")
    card.text(*at(6_100, 2_150), f"budget {BUDGET:,},", BLUE)
    card.text(*at(6_100, 1_250), f"segment {POLICY.segment:,}", BLUE)

    card.text(left + 8, bottom + 20, "prompt of 10,000 tokens →", PALE)
    card.text(edge + 8, bottom + 20, "answer →", PALE)
    card.text(left - 62, 22, "tokens held per KV head", PALE)
    return card


def _straight(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same line without points that lie on it."""
    kept = points[:1]
    for before, here, after in zip(points, points[1:], points[2:], strict=False):
        first = (here[0] - before[0]) * (after[1] - before[1])
        second = (after[0] - before[0]) * (here[1] - before[1])
        if abs(first - second) > 1e-6:
            kept.append(here)
    return kept + points[-1:]


def page() -> Card:
    """The bytes of one slot, to scale, and what its tail holds."""
    head = HEAD_DIM * ELEMENT_BYTES
    words = make_rule(POLICY).words
    tail = tail_bytes(1, 1, words)
    parts = [
        (f"signature, {POLICY.hash_bits} bits", POLICY.hash_bits // 8),
        ("coordinates", WORD_BYTES),
        ("votes", WORD_BYTES),
        ("position", WORD_BYTES),
    ]
    assert sum(size for _, size in parts) == tail
    card = Card(720, 190, "A slot's bytes: K, V and a tail")
    scale = 680 / (2 * head + tail)
    card.text(20, 26, f"one slot of one KV head, {HEAD_DIM} elements in bfloat16")
    x = 20.0
    for name, size, color in (
        (f"K, {head} bytes", head, BLUE),
        (f"V, {head} bytes", head, GREEN),
        ("", tail, ORANGE),
    ):
        card.box(x, 40, size * scale - 2, 40, color, name)
        x += size * scale
    share = f"{100 * tail / (2 * head):.1f} %"
    card.text(20, 145, f"its tail, {tail} bytes:", ORANGE)
    card.text(20, 165, f"{share} of K and V", ORANGE)
    x, scale = 230.0, 470 / tail
    left = 700 - tail * 680 / (2 * head + tail)
    card.path([(x, 118), (left, 82)], PALE, 1)
    card.path([(698, 118), (698, 82)], PALE, 1)
    for name, size in parts:
        card.box(x, 120, size * scale - 2, 40, ORANGE, name)
        card.text(x + size * scale / 2, 177, f"{size} bytes", PALE, "middle")
        x += size * scale
    return card


def token() -> Card:
    """What happens to one token in decode, in one layer."""
    card = Card(720, 250, "One decode token in one layer")
    card.text(20, 30, "the cache of one KV head, full:")
    recent = POLICY.recent
    middle = BUDGET - POLICY.sinks - recent
    x = 240.0
    for name, width, color in (
        (f"{POLICY.sinks} sinks", 70, GREY),
        (f"{middle} slots, each with its votes", 260, BLUE),
        (f"{recent} most recent", 125, GREY),
    ):
        card.box(x, 12, width - 2, 28, color, name)
        x += width
    card.text(240, 58, "kept", PALE)
    card.text(310, 58, "the fewest votes go, oldest if equal", BLUE)
    card.text(570, 58, "kept", PALE)
    steps = [
        (20, "1  q, k, v", GREY),
        (165, "2  find the victim", BLUE),
        (345, "3  overwrite it", BLUE),
        (505, "4  attention, stock kernel", GREEN),
    ]
    widths = [110, 145, 125, 195]
    for (x, text, color), width in zip(steps, widths, strict=True):
        card.box(x, 100, width, 40, color, text)
    for (x, _, _), width, (after, _, _) in zip(steps, widths, steps[1:], strict=False):
        card.arrow(x + width + 3, 120, after - 4, 120)
    every = POLICY.vote_every
    card.path([(75, 143), (75, 205), (341, 205)], PALE, 1.5)
    card.arrow(335, 205, 341, 205)
    card.box(
        345, 185, 355, 40, ORANGE, f"5  every {every}th token votes, for later tokens"
    )
    card.text(90, 200, "the query", INK)
    return card


DRAWN = {"slots": slots, "page": page, "token": token}


def main() -> None:
    """Write all figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=FIGURES)
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWN.items():
        (output / f"{name}.svg").write_text(str(draw()), encoding="utf-8")


if __name__ == "__main__":
    main()
