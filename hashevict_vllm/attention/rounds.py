"""A step's pieces as arrays, for all requests at once.

What `hashevict_vllm.plan` says of one request, without Python objects: a
server plans hundreds of requests in every step, and a layer of a small model takes less
time than their objects. Both devices cut their steps here; tests/test_plan.py compares
every number with `plan`, which is the text to read first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import numpy as np

from hashevict_vllm.kernels.codes import PROMPT_ENDS, PROMPT_GOES_ON
from hashevict_vllm.plan import Piece
from hashevict_vllm.resolved import VOTE_HORIZON, ResolvedKVPolicy


class Budgets(NamedTuple):
    """What every request of a step may keep.

    Attributes:
        budget: int64 [R], C of each.
        recent: int64 [R], the most recent tokens that each protects (`Piece`).

    """

    budget: np.ndarray
    recent: np.ndarray

    @classmethod
    def of(
        cls, policy: ResolvedKVPolicy, num_requests: int, own: Mapping[int, int]
    ) -> Budgets:
        """The server's budget for all but the rows that have their own."""
        budget = np.full(num_requests, policy.budget, np.int64)
        if own:
            budget[list(own)] = list(own.values())
        if policy.recent_percent is None:
            return cls(budget, np.full_like(budget, policy.recent))
        # As `resolved.share_of`.
        return cls(budget, (budget * policy.recent_percent / 100).astype(np.int64))


@dataclass(frozen=True)
class Pieces:
    """A round: at most one `Piece` of every request, by field, ordered by request.

    All int64 [P], but for two that are bool [P].
    """

    request: np.ndarray
    start: np.ndarray
    count: np.ndarray
    row: np.ndarray
    slot: np.ndarray
    budget: np.ndarray
    recent: np.ndarray
    evict: np.ndarray
    compact: np.ndarray
    first_voter: np.ndarray
    ballots: np.ndarray

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> Pieces:
        """The same pieces, of different requests."""
        pieces = list(pieces)
        columns = {
            field.name: np.array([getattr(piece, field.name) for piece in pieces])
            for field in fields(cls)
        }
        return cls(**columns)

    @property
    def live(self) -> np.ndarray:
        """int64 [P], `Piece.live_after_write`."""
        return np.where(self.evict, self.slot, self.slot + self.count)

    @property
    def reduced(self) -> np.ndarray:
        """Which pieces vote or overflow the budget, to be seen again: bool [P]."""
        overflows = ~self.evict & (self.slot + self.count > self.budget)
        return overflows | (self.first_voter < self.count)

    def table(self, names: Sequence[str]) -> np.ndarray:
        """int32 [P, columns] of fields, ``live`` among them."""
        columns = [getattr(self, name) for name in names]
        return np.stack(columns, axis=1).astype(np.int32)

    @cached_property
    def num_tokens(self) -> int:
        """n, tokens of the round."""
        return int(self.count.sum())

    def per_token(self, field: np.ndarray) -> np.ndarray:
        """A field's value for every token of the round: [n]."""
        # Where all decode, which is most steps, there is nothing to repeat.
        alone = len(self.count) == self.num_tokens
        return field if alone else np.repeat(field, self.count)

    def token_rows(self) -> np.ndarray:
        """int64 [n], rows of q, k and v that take part, ascending."""
        return self.tokens(self.row)

    def query_start_loc(self) -> np.ndarray:
        """int32 [P + 1], where pieces begin among the round's tokens, and their sum."""
        return np.concatenate(([0], self.count.cumsum())).astype(np.int32)

    def tokens(self, first: np.ndarray) -> np.ndarray:
        """int64 [n], numbers of all tokens, of which a piece's first has ``first``."""
        if len(first) == self.num_tokens:
            return first
        before = self.count.cumsum() - self.count
        return np.arange(self.num_tokens) + self.per_token(first - before)


def as_rows(rows: np.ndarray, num_tokens: int) -> np.ndarray | slice | None:
    """Ascending rows as a slice if they are consecutive; None if they are all."""
    if len(rows) == num_tokens:
        return None
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def cut_step(
    policy: ResolvedKVPolicy,
    starts: np.ndarray,
    ends: np.ndarray,
    prompt_lens: np.ndarray,
    budgets: Budgets,
) -> list[Pieces]:
    """The rounds of a step.

    Args:
        policy: The resolved policy.
        starts: int [R + 1], first row of each request in q, k, v.
        ends: int [R], tokens of each request after the step.
        prompt_lens: int [R], lengths of the original prompts.
        budgets: Of the requests.

    """
    row, end = starts[:-1].astype(np.int64), ends.astype(np.int64)
    position = end - np.diff(starts)
    rounds: list[Pieces] = []
    while len(left := np.flatnonzero(position < end)):
        chunks = (row[left], position[left], end[left], prompt_lens[left])
        kept = Budgets(budgets.budget[left], budgets.recent[left])
        pieces = _first_pieces(policy, kept, left, *chunks)
        row[left] += pieces.count
        position[left] += pieces.count
        rounds.append(pieces)
    return rounds


def _first_pieces(
    policy: ResolvedKVPolicy,
    kept: Budgets,
    request: np.ndarray,
    row: np.ndarray,
    position: np.ndarray,
    end: np.ndarray,
    prompt_len: np.ndarray,
) -> Pieces:
    """The first piece of each chunk, as the body of `plan.cut_chunk`; all int [R]."""
    budget, segment = kept.budget, policy.segment
    slot = np.minimum(position, budget)
    stop = np.minimum(end, np.maximum(position + 1, budget))
    reads = position < prompt_len if segment > 1 else np.zeros(len(position), bool)
    compact, evict = np.zeros(len(position), int), position >= budget
    first = _first_in_decode(policy, budget, position)
    if reads.any():
        complete = position // segment * segment
        held = np.minimum(complete, budget) + position - complete
        slot = np.where(reads & (position > budget), held, slot)
        # The first reduction comes at the first boundary past the budget.
        boundary = np.maximum(complete + segment, -(-budget // segment) * segment)
        boundary = np.minimum(boundary, prompt_len)
        stop = np.where(reads, np.minimum(end, boundary), stop)
        overflows = slot + stop - position > budget
        why = np.where(stop < prompt_len, PROMPT_GOES_ON, PROMPT_ENDS)
        compact = np.where(reads & (stop == boundary) & overflows, why, 0)
        evict = evict & ~reads
        reading = _first_in_prompt(policy, budget, position, stop, prompt_len)
        first = np.where(reads, reading, first)
    return Pieces(
        request=request,
        start=position,
        count=stop - position,
        row=row,
        slot=slot,
        budget=budget,
        recent=kept.recent,
        evict=evict,
        compact=compact,
        first_voter=np.minimum(first, stop) - position,
        ballots=np.where(reads, 0, policy.vote_every),
    )


NOBODY = np.iinfo(np.int64).max


def _first_in_decode(
    policy: ResolvedKVPolicy, budget: np.ndarray, position: np.ndarray
) -> np.ndarray:
    """int64 [R], the first position that may vote; as `ResolvedKVPolicy.voters`."""
    if not policy.votes:
        return np.full(len(position), NOBODY)
    first = np.maximum(position, np.maximum(budget - VOTE_HORIZON, 1))
    first = np.maximum(first, policy.sinks)
    return -(-first // policy.vote_every) * policy.vote_every


def _first_in_prompt(
    policy: ResolvedKVPolicy,
    budget: np.ndarray,
    position: np.ndarray,
    stop: np.ndarray,
    prompt_len: np.ndarray,
) -> np.ndarray:
    """The same, while a prompt is read in segments."""
    if not policy.votes:
        return np.full(len(position), NOBODY)
    begin = (stop - 1) // policy.segment * policy.segment
    end = np.minimum(begin + policy.segment, prompt_len)
    too_early = budget - np.where(end == prompt_len, VOTE_HORIZON, 0)
    first = np.maximum(np.maximum(position, begin), end - policy.window)
    first = np.maximum(first, max(policy.sinks, 1))
    return np.where(end <= too_early, NOBODY, first)
