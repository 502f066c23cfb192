"""Cuts a step that reads prompts into rounds on the host, as tables for the kernels.

The host knows how far prompts have been read (the scheduler counts), so nothing here
waits for the device. The pieces are those of `hashevict_vllm.attention.plan`, and so of
the CPU's builder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from hashevict_vllm.attention.plan import Piece, cut_chunk
from hashevict_vllm.kernels.triton.pieces import NAMES
from hashevict_vllm.resolved import ResolvedKVPolicy


def piece_rows(pieces: Sequence[Piece]) -> list[list[int]]:
    """Pieces as rows of the kernels' table."""
    return [
        [int({**vars(p), "live": p.live_after_write}[name]) for name in NAMES]
        for p in pieces
    ]


@dataclass(frozen=True)
class HostRound:
    """At most one piece of every request.

    Attributes:
        pieces: In the order of their requests.
        reduced: Those of them that vote, or mark slots, after they were attended to.
        rows: Rows of q, k, v that take part.
        token_piece: For each token of the step its index in ``pieces``, or -1.
        query_start_loc: Where the pieces begin in ``rows``, and its length.

    """

    pieces: list[Piece]
    reduced: list[Piece]
    rows: list[int]
    token_piece: list[int]
    query_start_loc: list[int]

    @classmethod
    def of(cls, pieces: list[Piece], num_tokens: int, budget: int) -> HostRound:
        """Lay out one round of a step of ``num_tokens`` tokens."""
        rows: list[int] = []
        token_piece = [-1] * num_tokens
        query_start_loc = [0]
        for index, piece in enumerate(pieces):
            span = range(piece.row, piece.row + piece.count)
            token_piece[span.start : span.stop] = [index] * piece.count
            rows += span
            query_start_loc.append(len(rows))
        reduced = [
            p
            for p in pieces
            if p.first_voter < p.count or (not p.evict and p.slot + p.count > budget)
        ]
        return cls(pieces, reduced, rows, token_piece, query_start_loc)


def cut_step(
    policy: ResolvedKVPolicy,
    starts: Sequence[int],
    ends: Sequence[int],
    prompt_lens: Sequence[int],
    num_tokens: int,
) -> list[HostRound]:
    """The rounds of a step.

    Args:
        policy: The resolved policy.
        starts: [R + 1], first row of each request in q, k, v.
        ends: [R], tokens of each request after the step.
        prompt_lens: [R], lengths of the original prompts.
        num_tokens: Rows of q, k, v.

    """
    requests = [
        cut_chunk(
            policy,
            request,
            row=starts[request],
            start=ends[request] - (starts[request + 1] - starts[request]),
            end=ends[request],
            prompt_len=prompt_len,
        )
        for request, prompt_len in enumerate(prompt_lens)
    ]
    return [
        HostRound.of([p for p in pieces if p is not None], num_tokens, policy.budget)
        for pieces in zip_longest(*requests)
    ]
