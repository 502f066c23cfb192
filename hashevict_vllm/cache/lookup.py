"""Finds the blocks that a request may start from.

vLLM's finder is a class method of the manager: it knows hashes and the pool, but not
the request. What it must know of it, and of blocks that other requests are about to
fill, lies in a ledger beside the pool.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from hashevict_vllm.reuse import Reuse


class Asking(NamedTuple):
    """The request whose prefix is being looked up.

    Attributes:
        reuse: Its numbers; None if it must not use other requests' blocks.
        shares: Whether it never writes to a block that others read.

    """

    reuse: Reuse | None
    shares: bool


class PoolLedger:
    """What the managers of one block pool and the finder, a classmethod, share.

    Attributes:
        fresh: Ids of blocks that got their hash in this scheduling pass: their tokens
            are not computed yet when copies run.
        private: Ids of blocks that their request overwrites in place.
        asking: See there.

    """

    def __init__(self) -> None:
        self.fresh: set[int] = set()
        self.private: set[int] = set()
        self.asking = Asking(None, False)

    def may_use(self, block: KVCacheBlock) -> bool:
        """Whether the asking request may start from a block."""
        if block.block_id not in self.fresh:
            return True
        # As in stock vLLM, whose requests read what others write in the same step.
        return self.asking.shares and block.block_id not in self.private


_LEDGERS: WeakKeyDictionary[BlockPool, PoolLedger] = WeakKeyDictionary()


def ledger_of(pool: BlockPool) -> PoolLedger:
    """The ledger of a pool."""
    return _LEDGERS.setdefault(pool, PoolLedger())


def snapshot_keys(prefix: BlockHash, reuse: Reuse) -> list[BlockHash]:
    """Keys of the blocks of a snapshot, which requests of one budget share.

    Args:
        prefix: Hash of the block that ends the prefix: it covers all tokens before.
        reuse: Numbers of the request.

    """
    kind = b"snapshot of %d slots, " % reuse.policy.budget
    return [
        BlockHash(hashlib.sha256(kind + b"%d " % row + prefix).digest())
        for row in range(reuse.live_blocks)
    ]


def find_hit(
    pool: BlockPool,
    groups: list[int],
    hashes: Sequence[BlockHash],
    max_length: int,
    alignment: int,
) -> tuple[list[list[KVCacheBlock]], int]:
    """The longest snapshot, or else run of raw blocks, for the asking request.

    Args:
        pool: The block pool.
        groups: KV-cache groups that must all have a block.
        hashes: Of the request's blocks.
        max_length: Most tokens of a hit.
        alignment: Tokens that a hit must be a multiple of.

    Returns:
        Blocks by row, one of every group in each, and the tokens that they stand for.

    """
    ledger = ledger_of(pool)
    reuse = ledger.asking.reuse
    if reuse is None:
        return [], 0

    def cached(keys: Iterable[BlockHash]) -> list[list[KVCacheBlock]]:
        rows = []
        for key in keys:
            found = pool.get_cached_block(key, groups)
            if not found or not all(map(ledger.may_use, found)):
                break
            rows.append(found)
        return rows

    size = reuse.block_size
    for end in reuse.snapshots(min(max_length, len(hashes) * size)):
        if end % alignment == 0:
            rows = cached(snapshot_keys(hashes[end // size - 1], reuse))
            if len(rows) == reuse.live_blocks:
                return rows, end
    rows = cached(hashes[: min(max_length, reuse.longest_raw_hit) // size])
    length = len(rows) * size // alignment * alignment
    if length < reuse.policy.sinks:  # keys are described once the sinks are there
        return [], 0
    return rows[: length // size], length
