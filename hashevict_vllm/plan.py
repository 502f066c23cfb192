"""What each request appends, evicts and attends in one step, from token counts alone.

No per-request state is kept on the worker: how many slots are in use after x tokens of
a request with a prompt of P follows from x, P, the budget C and the segment S. That is
why results do not depend on how the scheduler cuts a prompt (design 1.3).

A chunk is cut into *pieces*; each is one append (or one eviction), one attention call
and, if its segment overflows the budget, one replay. The i-th pieces of all requests of
a step form a *round* and share one attention call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from hashevict_vllm.kernels.codes import PROMPT_ENDS, PROMPT_GOES_ON
from hashevict_vllm.resolved import ResolvedKVPolicy

MAX_ROUNDS = 32
"""Most rounds of a step: replayed output, and prompts that are read token by token,
would have one for every token."""


def most_slots(policy: ResolvedKVPolicy, max_model_len: int) -> int:
    """Most slots that any request ever has, which may be all of its tokens."""
    reduced = most_reduced_slots(policy, max_model_len)
    return max(reduced, max_model_len) if policy.allow_full else reduced


def most_reduced_slots(policy: ResolvedKVPolicy, max_model_len: int) -> int:
    """Most slots that are ever reduced: a full budget, and a segment behind it."""
    segment = policy.segment if policy.segment > 1 else 0
    return min(policy.budget + segment, max(max_model_len, policy.budget))


def longest_held(policy: ResolvedKVPolicy) -> int:
    """Tokens of the longest prompt that nothing is evicted from before its end.

    That is up to the first end of a segment past the budget.
    """
    if policy.segment == 1:
        return policy.budget
    return (policy.budget // policy.segment + 1) * policy.segment


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one request that attend together.

    Attributes:
        request: Row of the request in the batch.
        start: Position of the first token.
        count: Number of tokens.
        row: Index of the first token in the step's q, k, v.
        slot: Slot of the first token: live slots (and open scratch) lie below it. For
            an evicting piece it equals C, and the token takes its victim's slot.
        budget: C of its request.
        recent: The most recent tokens that its request does not evict in decode; a
            selection by votes protects fewer (`codes.RECENT_IN_SELECTION`).
        evict: The decode rule: one token, evict before attention.
        first_voter: The piece's first token whose queries vote; ``count`` if none does.
        ballots: In decode, distance of voting tokens; 0 while a segment is read, where
            all tokens from the first voter on vote.
        compact: Whether to reduce the live set to C afterwards, `PROMPT_ENDS` or
            `PROMPT_GOES_ON` (a segment is complete); else 0.

    """

    request: int
    start: int
    count: int
    row: int
    slot: int
    budget: int
    recent: int
    evict: bool = False
    compact: int = 0
    first_voter: int = 0
    ballots: int = 0

    @property
    def live_after_write(self) -> int:
        """Slots that the piece's last token attends to."""
        return self.slot if self.evict else self.slot + self.count


def occupied_slots(policy: ResolvedKVPolicy, num_tokens: int, prompt_len: int) -> int:
    """Slots in use, live and open scratch, after ``num_tokens`` tokens."""
    budget, segment = policy.budget, policy.segment
    if num_tokens <= budget or num_tokens >= prompt_len or segment == 1:
        return min(num_tokens, budget)
    complete = num_tokens // segment * segment
    return min(complete, budget) + num_tokens - complete


def cut_chunk(
    policy: ResolvedKVPolicy,
    request: int,
    row: int,
    start: int,
    end: int,
    prompt_len: int,
) -> Iterator[Piece]:
    """Cut the chunk of positions [start, end) of one request into pieces.

    Args:
        policy: The resolved policy, with the request's budget.
        request: Row of the request in the batch.
        row: Index of the chunk's first token in the step's q, k, v.
        start: Tokens computed before the step.
        end: Tokens computed after it.
        prompt_len: Length of the original prompt; replayed output (after a preemption)
            lies beyond it and follows the decode rule.

    """
    budget, segment = policy.budget, policy.segment
    position = start
    while position < end:
        slot = occupied_slots(policy, position, prompt_len)
        evict, compact = False, 0
        if position < prompt_len and segment > 1:
            boundary = (position // segment + 1) * segment
            if boundary <= budget:
                # No reduction happens before the first boundary past the budget, so
                # these segments are one piece, exactly what stock vLLM would do.
                boundary = -(-budget // segment) * segment
            boundary = min(boundary, prompt_len)
            stop = min(end, boundary)
            if stop == boundary and slot + stop - position > budget:
                compact = PROMPT_GOES_ON if stop < prompt_len else PROMPT_ENDS
        elif position < budget:
            stop = min(end, budget)
        else:
            stop = position + 1
            evict = True
        voters = policy.voters(position, stop, prompt_len)
        yield Piece(
            request=request,
            start=position,
            count=stop - position,
            row=row + position - start,
            slot=slot,
            budget=budget,
            recent=policy.recent,
            evict=evict,
            compact=compact,
            first_voter=voters[0] - position if voters else stop - position,
            ballots=policy.vote_every if position >= prompt_len or segment == 1 else 0,
        )
        position = stop


def limit_chunk(
    policy: ResolvedKVPolicy, start: int, count: int, prompt_len: int
) -> int:
    """Tokens of a chunk of ``count`` from ``start`` on, cut to `MAX_ROUNDS` pieces.

    For the scheduler: results do not depend on where chunks end.
    """
    if count <= MAX_ROUNDS:
        return count
    pieces = cut_chunk(policy, 0, 0, start, start + count, prompt_len)
    return sum(piece.count for piece in islice(pieces, MAX_ROUNDS))
