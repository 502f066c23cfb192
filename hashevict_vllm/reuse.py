"""What of one request's pages another may use, from token counts alone.

K, V and what a slot keeps of its key are functions of the token prefix. Before a prompt
is first reduced, a request's i-th block holds its tokens [iN, (i + 1)N), as in stock
vLLM: these blocks are *raw*. After a reduction at the end of a segment inside the
prompt, all its live slots are a function of the tokens read so far, votes included:
that state is a *snapshot*. Votes in raw blocks are not (they depend on where the prompt
ends), and so a hit must leave all voters to be computed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from hashevict_vllm.plan import longest_held
from hashevict_vllm.resolved import ResolvedKVPolicy


@dataclass(frozen=True)
class Reuse:
    """The numbers of one request.

    Attributes:
        policy: The resolved policy.
        block_size: N.
        prompt_len: P.

    """

    policy: ResolvedKVPolicy
    block_size: int
    prompt_len: int

    @cached_property
    def live_blocks(self) -> int:
        """Blocks that hold the live slots of a full cache: ceil(C / N)."""
        return -(-self.policy.budget // self.block_size)

    @cached_property
    def first_reduction(self) -> int | None:
        """Tokens after which the live set is first reduced; None if a prompt is not."""
        if self.policy.segment == 1 or self.prompt_len <= self.policy.budget:
            return None
        return min(longest_held(self.policy), self.prompt_len)

    @cached_property
    def raw_tokens(self) -> int:
        """Tokens that lie in slots of their own number, while nothing is overwritten.

        Up to the first reduction, or, without one, up to a full budget.
        """
        return self.first_reduction or self.policy.budget

    @cached_property
    def first_voter(self) -> int:
        """Position of the first token whose query votes."""
        policy, prompt_len = self.policy, self.prompt_len
        if policy.segment > 1:
            if voters := policy.voters(
                0, self.first_reduction or prompt_len, prompt_len
            ):
                return voters[0]
            start = prompt_len
        else:
            start = 0
        end = max(start, policy.first_ballot) + policy.vote_every + 1
        return policy.voters(start, end, prompt_len)[0]

    @cached_property
    def longest_raw_hit(self) -> int:
        """Most tokens of raw blocks that the request may start from."""
        return min(self.first_voter, self.raw_tokens)

    def never_overwrites(self, num_tokens: int) -> bool:
        """Whether a request of so many tokens neither votes nor evicts."""
        return num_tokens <= self.longest_raw_hit

    def overwritten(self, end: int) -> int:
        """How many of the first raw blocks are no longer raw after ``end`` tokens.

        A reduction, or the first eviction, writes to the blocks of the live slots; the
        next segment's tokens take the slots behind them.
        """
        reduction = self.first_reduction
        if reduction is None:
            return self.live_blocks if end > self.policy.budget else 0
        if end > reduction and reduction < self.prompt_len:
            return -(-reduction // self.block_size)
        return self.live_blocks if end >= reduction else 0

    def chunk_end(self, start: int, end: int) -> int:
        """Where a chunk of positions [start, end) had better stop, to be cached.

        Not where blocks are filled and overwritten at once, and at states that can be
        kept; otherwise ``end``. Results do not depend on it.
        """
        last_raw = (self.first_reduction or self.policy.budget + 1) - 1
        filled = min(self.live_blocks, last_raw // self.block_size) * self.block_size
        if start < filled and end > last_raw:
            return filled
        reduction = self.first_reduction
        if reduction is None:
            return end
        if start < reduction:
            return min(end, reduction)
        last = next(self.snapshots(end), start)
        return last if last > start else end

    def is_snapshot(self, num_tokens: int) -> bool:
        """Whether the live slots after so many tokens are a function of these alone."""
        return next(self.snapshots(num_tokens), None) == num_tokens

    def snapshots(self, longest: int) -> Iterator[int]:
        """Token counts of snapshots, from ``longest`` downwards.

        The end of the prompt is none: what follows it differs from request to request.
        """
        reduction = self.first_reduction
        if reduction is not None:
            segment = self.policy.segment
            last = min(longest, self.prompt_len - 1) // segment * segment
            yield from range(last, reduction - 1, -segment)


@functools.lru_cache(maxsize=4096)
def reuse_of(policy: ResolvedKVPolicy, block_size: int, prompt_len: int) -> Reuse:
    """A `Reuse`, kept, as a server asks for the same numbers in every step."""
    return Reuse(policy, block_size, prompt_len)
