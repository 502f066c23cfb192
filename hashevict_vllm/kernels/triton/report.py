"""Prints the tables of ``docs/gpu.md`` (``python -m``).

Registers and shared memory are read from machine code; bytes and microseconds are
arithmetic: what a launch must at least read and write, over an H100's bandwidth.
"""

from __future__ import annotations

import dataclasses

from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.triton.aot import ARCHITECTURES, compile_launch
from hashevict_vllm.kernels.triton.frame import FRAME_VECTORS
from hashevict_vllm.kernels.triton.shapes import SHAPES, Shape

BANDWIDTH = 3.35e12
"""Bytes per second of an H100 SXM's memory (NVIDIA's data sheet)."""

_WORD, _DOUBLE = 4, 8
_DECODE = ("plan", "sign", "write", "write, no scan", "frame", "describe")


def floor_bytes(shape: Shape) -> dict[str, int]:
    """Bytes that each launch must move, every one counted once.

    Decode kernels: ``shape.tokens`` requests, each evicting a token. The others: one
    segment of one request with a full budget, half of whose survivors move. With votes
    a decoding token casts a ballot, which is so for one of ``vote_every``.
    """
    rule, heads, dim = shape.rule, shape.heads, shape.head_dim
    element = shape.dtype.itemsize
    slot_element = (shape.cache_dtype or shape.dtype).itemsize
    described = _WORD * (shape.group + 1) * (rule.hashed + 1)
    meta = _WORD * (rule.words + 1)
    row = 2 * dim * (element + slot_element) + meta
    segment_rows = heads * shape.bound
    moves = heads * min(shape.budget, shape.segment) // 2
    # A vote reads signature, numbers, votes and position, and writes votes; it needs
    # the sinks' keys, too.
    scan = shape.budget * (meta + (_WORD if rule.votes else 0))
    hashed = shape.tokens * heads * (dim * element * (shape.group + 1) + described)
    votes = rule.votes
    queries = dim * element * shape.group * heads + _WORD * dim * rule.bits
    sinks = rule.sinks * dim * slot_element
    frame = FRAME_VECTORS.value * dim * _DOUBLE
    return {
        "plan": shape.tokens * _WORD * 16,
        "sign": hashed + _WORD * dim * rule.bits,
        "write": shape.tokens * heads * (scan + row)
        + (shape.tokens * (queries + heads * sinks) if votes else 0),
        "frame": shape.tokens * heads * (sinks + frame),
        "describe": shape.tokens * heads * (frame + dim * slot_element + meta)
        + _WORD * dim * rule.bits,
        "write, no scan": shape.tokens * heads * row,
        "replay": segment_rows * meta + heads * shape.segment * _WORD,
        "vote": segment_rows * (meta + _WORD) + heads * sinks if votes else 0,
        "pool": segment_rows * _WORD * 3,  # one of two launches
        "select": segment_rows * _WORD * 3 + heads * shape.segment * _WORD,
        "pair": segment_rows * _WORD + moves * 2 * _WORD,
        "move": moves * 2 * (2 * dim * slot_element + meta),
    }


def _floor_table(shape: Shape) -> list[str]:
    floors = floor_bytes(shape)
    lines = ["| kernel | bytes | per token | µs at 3.35 TB/s |", "|---|---:|---:|---:|"]
    for name in dict.fromkeys(launch.name for launch in shape.launches()):
        decode = name in _DECODE
        tokens = shape.tokens if decode else shape.segment
        moved = floors[name]
        lines.append(
            f"| `{name}` | {moved:,} | {moved // tokens:,} "
            f"| {moved / BANDWIDTH * 1e6:.2f} |"
        )
    return lines


def _resource_table() -> list[str]:
    heads = " | ".join(f"sm_{a}" for a in ARCHITECTURES)
    lines = [
        f"| shape | kernel | threads | registers: {heads} | shared bytes | spills, "
        "local bytes |",
        "|---|---|---:|" + "---:|" * (len(ARCHITECTURES) + 2),
    ]
    for label, shape in SHAPES.items():
        for launch in shape.launches():
            cells, used = [], []
            for architecture in ARCHITECTURES:
                if not launch.runs_on(architecture):
                    cells.append("–")
                    continue
                used.append(compile_launch(launch, architecture))
                cells.append(str(used[-1].registers))
            lines.append(
                f"| {label} | `{launch.name}` | {used[0].threads} "
                f"| {' | '.join(cells)} | {max(r.shared for r in used):,} "
                f"| {max(r.stack for r in used)}, {max(r.local for r in used)} |"
            )
    return lines


def main() -> None:
    """Print both tables as Markdown."""
    decode = Shape()
    for kind, label in ((decode.kind, "instant"), (codes.VOTE, "vote")):
        shape = dataclasses.replace(decode, kind=kind)
        print(f"### `scoring = {label}`\n")
        print("\n".join(_floor_table(shape)), end="\n\n")
    print("### Compiled\n")
    print("\n".join(_resource_table()))


if __name__ == "__main__":
    main()
