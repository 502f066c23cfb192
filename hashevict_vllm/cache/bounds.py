"""Most blocks that a request may hold, in plain numbers (design 1.4)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from hashevict_vllm.resolved import ResolvedKVPolicy


@dataclass(frozen=True)
class BlockBounds:
    """What bounds a request's blocks.

    Attributes:
        budget: C, live slots per KV head.
        segment: S, prompt tokens held before the live set is reduced; 1 evicts token
            by token, before it writes.
        block_size: N, slots of a block.

    """

    budget: int
    segment: int
    block_size: int

    @property
    def steady_blocks(self) -> int:
        """Most blocks once the prompt is read: ceil(C / N)."""
        return -(-self.budget // self.block_size)

    def decode_blocks(self, num_tokens: int) -> int:
        """Most blocks of ``num_tokens`` tokens once the prompt is read."""
        return -(-min(num_tokens, self.budget) // self.block_size)

    def prefill_blocks(self, num_tokens: int) -> int:
        """Most blocks while a prompt is read up to ``num_tokens``."""
        most = self.budget + (self.segment if self.segment > 1 else 0)
        return -(-min(num_tokens, most) // self.block_size)


@functools.lru_cache(maxsize=4096)
def bounds_of(policy: ResolvedKVPolicy, block_size: int) -> BlockBounds:
    """What bounds the requests of a policy, kept."""
    return BlockBounds(policy.budget, policy.segment, block_size)
