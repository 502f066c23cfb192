"""From what the engine read to an answer of bounded size."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hashevict_vllm.server.schemas import HeldSlots, Retention

MAX_CELLS = 2**16
"""Most numbers in `Retention.held`; columns become wider instead."""

MAX_SLOTS_LISTED = 2**17
"""Most slots in `Retention.slots`; more are refused."""

MAX_BITMAP_BYTES = 2**21
"""Most bytes of all bitmaps; more are refused."""


class TooLarge(Exception):
    """An answer beyond a bound; the text says what to ask for instead."""


@dataclass(frozen=True)
class Question:
    """What of a request's retention is asked for.

    Attributes:
        start: First position.
        stop: End of the positions; None for all that are written.
        columns: Most columns of `Retention.held`.
        bitmap: Whether to add bitmaps.
        slots: Whether to list positions and votes.

    """

    start: int = 0
    stop: int | None = None
    columns: int = 256
    bitmap: bool = False
    slots: bool = False


class Layer(NamedTuple):
    """One layer as `cache.retention.read_retention` found it, as arrays.

    Attributes:
        layer: Index.
        positions: int32 [H, n].
        votes: float32 [H, n] or None.

    """

    layer: int
    positions: np.ndarray
    votes: np.ndarray | None


def answer(request_id: str, found: dict[str, Any], asked: Question) -> Retention:
    """Cut, count and pack.

    Args:
        request_id: The client's id.
        found: What `cache.retention.read_retention` returned.
        asked: The question.

    Raises:
        TooLarge: If it would be larger than a bound.

    """
    layers = [_arrays(*layer) for layer in found["layers"]]
    tokens = found["tokens"]
    start = min(asked.start, tokens)
    stop = max(min(tokens if asked.stop is None else asked.stop, tokens), start)
    columns = max(1, min(asked.columns, MAX_CELLS // max(len(layers), 1)))
    width = max(1, -(-(stop - start) // columns))
    shown = -(-(stop - start) // width)
    kept = [_pairs(layer.positions, start, stop) for layer in layers]
    return Retention(
        id=request_id,
        **{key: found[key] for key in ("prompt_tokens", "budget", "live_slots")},
        tokens=tokens,
        blocks=found["blocks"],
        layers=[layer.layer for layer in layers],
        kv_heads=[len(layer.positions) for layer in layers],
        start=start,
        stop=stop,
        width=width,
        held=[
            np.bincount((pairs.positions - start) // width, minlength=shown).tolist()
            for pairs in kept
        ],
        bitmaps=_bitmaps(layers, kept, start, stop) if asked.bitmap else None,
        slots=_slots(layers, kept) if asked.slots else None,
    )


def _arrays(layer: int, heads: int, positions: bytes, votes: bytes | None) -> Layer:
    shape = (heads, -1)
    return Layer(
        layer,
        np.frombuffer(positions, np.int32).reshape(shape),
        None if votes is None else np.frombuffer(votes, np.float32).reshape(shape),
    )


class Pairs(NamedTuple):
    """Slots of a layer that hold a position asked for.

    Attributes:
        heads: int64 [m], ascending.
        slots: int64 [m].
        positions: int32 [m].

    """

    heads: np.ndarray
    slots: np.ndarray
    positions: np.ndarray


def _pairs(positions: np.ndarray, start: int, stop: int) -> Pairs:
    """Of int32 [H, n], those in range.

    Negative ones are lost, though their K and V stay until their segment is complete.
    """
    heads, slots = np.nonzero((positions >= start) & (positions < stop))
    return Pairs(heads, slots, positions[heads, slots])


def _bitmaps(
    layers: Sequence[Layer], kept: Sequence[Pairs], start: int, stop: int
) -> list[str]:
    heads = [len(layer.positions) for layer in layers]
    size = sum(heads) * -(-(stop - start) // 8)
    if size > MAX_BITMAP_BYTES:
        raise TooLarge(
            f"include=bitmap: {size} bytes are more than {MAX_BITMAP_BYTES}; name "
            "fewer layers, or a shorter range of positions."
        )
    bitmaps = []
    for count, pairs in zip(heads, kept, strict=True):
        mask = np.zeros((count, stop - start), bool)
        mask[pairs.heads, pairs.positions - start] = True
        packed = np.packbits(mask, axis=1).tobytes()
        bitmaps.append(base64.b64encode(packed).decode())
    return bitmaps


def _slots(layers: Sequence[Layer], kept: Sequence[Pairs]) -> list[HeldSlots]:
    count = sum(len(pairs.slots) for pairs in kept)
    if count > MAX_SLOTS_LISTED:
        raise TooLarge(
            f"include=slots: {count} slots are more than {MAX_SLOTS_LISTED}; name "
            "fewer layers, or a shorter range of positions."
        )
    return [
        _head(layer, pairs, head)
        for layer, pairs in zip(layers, kept, strict=True)
        for head in range(len(layer.positions))
    ]


def _head(layer: Layer, pairs: Pairs, head: int) -> HeldSlots:
    """What one head holds, in order of position."""
    own = pairs.heads == head
    order = pairs.positions[own].argsort()
    votes = None
    if layer.votes is not None:
        votes = layer.votes[head, pairs.slots[own][order]].tolist()
    return HeldSlots(
        layer=layer.layer,
        head=head,
        positions=pairs.positions[own][order].tolist(),
        votes=votes,
    )
