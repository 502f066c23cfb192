"""Prints the tables of ``docs/gpu.md`` (``python -m``).

Registers and shared memory are read from machine code; bytes and microseconds are
arithmetic: what a launch must at least read and write, over an H100's bandwidth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.triton import launch
from hashevict_vllm.kernels.triton.aot import ARCHITECTURES, compile_launch
from hashevict_vllm.kernels.triton.cost import BANDWIDTH, prompt_table, table
from hashevict_vllm.kernels.triton.frame import FRAME_VECTORS
from hashevict_vllm.kernels.triton.shapes import SHAPES, Shape

_WORD, _DOUBLE = 4, 8
_DECODE = ("plan", "sign", "write", "ballot")


def floor_bytes(shape: Shape) -> dict[str, int]:
    """Bytes that each launch must move, every one counted once.

    Decode kernels: ``shape.tokens`` requests, each evicting a token, and casting a
    ballot, which is so for one of ``vote_every``; a ballot finds so many keys that are
    to be described. The others: one segment of one request with a full budget, half of
    whose survivors move, and what copies a prompt's tokens, ``shape.segment`` of them.
    """
    rule, heads, dim = shape.rule, shape.heads, shape.head_dim
    element = shape.dtype.itemsize
    slot_element = (shape.cache_dtype or shape.dtype).itemsize
    described = _WORD * (shape.group + 1) * (rule.hashed + 1)
    meta = _WORD * (rule.words + 1)
    row = 2 * dim * (element + slot_element) + meta
    slots = heads * shape.bound
    moves = heads * min(shape.budget, shape.segment) // 2
    hashed = shape.tokens * heads * (dim * element * (shape.group + 1) + described)
    projection = _WORD * dim * rule.bits
    sinks = heads * rule.sinks * dim * slot_element
    frame = heads * FRAME_VECTORS.value * dim * _DOUBLE
    # A score is a word, or a signature; an order of votes needs the position, too.
    scanned = _WORD * (2 if rule.votes else rule.words + 1)
    # A ballot reads all words and writes votes.
    voted = heads * (shape.budget * (meta + _WORD) + rule.every * dim * slot_element)
    queries = rule.window * heads * shape.group
    slices, tile = launch.VALUE_SLICES, launch.value_tile(dim)
    tops = 2 * _WORD * queries * -(-shape.bound // launch.SEGMENT_TILE)
    asked = _WORD * queries * (rule.bits + 2)
    sums = _WORD * heads * min(slices, -(-shape.bound // tile)) * dim
    return {
        "plan": shape.tokens * _WORD * 16,
        "sign": hashed + projection,
        "write": shape.tokens * heads * (shape.budget * scanned + row),
        "ballot": shape.tokens * (voted + sinks + heads * shape.group * dim * element)
        + projection,
        "write, no scan": shape.segment * heads * row,
        "frame": sinks + frame,
        "describe": shape.segment * heads * (dim * slot_element + meta)
        + frame
        + projection,
        "replay": slots * meta + heads * shape.segment * _WORD,
        "ask": queries * dim * element + frame + projection + asked,
        "tops": slots * (meta - _WORD) + asked + tops,
        "totals": tops + 2 * _WORD * queries,
        "add": slots * (meta + _WORD) + asked + 2 * _WORD * queries,
        "values": slots * dim * slot_element + sums,
        "apart": slots * (dim * slot_element + 2 * _WORD) + sums,
        "pool": slots * _WORD * 5,  # the second of three launches
        "select": slots * _WORD * 2 + heads * shape.segment * _WORD,
        "pair": slots * _WORD + moves * 2 * _WORD,
        "move": moves * 2 * (2 * dim * slot_element + meta),
    }


def _floor_table(shape: Shape) -> list[str]:
    floors = floor_bytes(shape)
    lines = ["| kernel | bytes | per token | µs at 3.35 TB/s |", "|---|---:|---:|---:|"]
    for name in dict.fromkeys(made.name for made in shape.launches()):
        decode = name in _DECODE
        tokens = shape.tokens if decode else shape.segment
        moved = floors[name]
        lines.append(
            f"| `{name}` | {moved:,} | {moved // tokens:,} "
            f"| {moved / BANDWIDTH * 1e6:.2f} |"
        )
    return lines


def _resource_table() -> Iterator[str]:
    heads = " | ".join(f"sm_{a}" for a in ARCHITECTURES)
    yield (
        f"| shape | kernel | threads | registers: {heads} | shared bytes | spills, "
        "local bytes |"
    )
    yield "|---|---|---:|" + "---:|" * (len(ARCHITECTURES) + 2)
    for label, shape in SHAPES.items():
        for made in shape.launches():
            cells, used = [], []
            for architecture in ARCHITECTURES:
                if not made.runs_on(architecture):
                    cells.append("–")
                    continue
                used.append(compile_launch(made, architecture))
                cells.append(str(used[-1].registers))
            yield (
                f"| {label} | `{made.name}` | {used[0].threads} "
                f"| {' | '.join(cells)} | {max(r.shared for r in used):,} "
                f"| {max(r.stack for r in used)}, {max(r.local for r in used)} |"
            )


def main() -> None:
    """Print the tables as Markdown."""
    decode = Shape()
    for kind, label in ((decode.kind, "instant"), (codes.VOTE, "vote")):
        shape = dataclasses.replace(decode, kind=kind)
        print(f"### `scoring = {label}`\n")
        print("\n".join(_floor_table(shape)), end="\n\n")
    print("### A decode step\n")
    print("\n".join(table()), end="\n\n")
    print("### The end of a segment\n")
    print("\n".join(prompt_table()), end="\n\n")
    print("### Compiled\n")
    for line in _resource_table():  # minutes, where nothing is compiled yet
        print(line, flush=True)


if __name__ == "__main__":
    main()
