"""Prefix caching of budgeted blocks: private pages, side copies.

A request that may vote or evict writes to its blocks in place, so they are its own.
What is cached stays *beside* it, as copies that nobody holds (reference count 0, in the
pool's LRU list): a cached prefix never costs capacity. A hit takes such a copy over, or
copies from a block that another request holds; before a block under a hash is
overwritten, hash and pages move to a free block, if there is one. Copies travel by
vLLM's own channel (``take_pending_cow_copies``) and run before the step's forward. What
may be cached, and when it is overwritten, follows from token counts
(`hashevict_vllm.reuse`).

Requests that are too short to ever vote or evict share blocks as in stock vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashList,
    KVCacheBlock,
    make_block_hash_with_group_id,
    resolve_block_hashes,
)
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from hashevict_vllm.cache.copies import PageCopy
from hashevict_vllm.cache.lookup import Asking, find_hit, ledger_of, snapshot_keys
from hashevict_vllm.cache.manager import BudgetedAttentionManager
from hashevict_vllm.plan import limit_chunk
from hashevict_vllm.reuse import Reuse, reuse_of


def is_snapshot(block: KVCacheBlock) -> bool:
    """Whether a cached block is one of a snapshot's, which hold no run of tokens."""
    return block.block_hash is not None and block.block_hash_num_tokens is None


class PrefixCachingManager(BudgetedAttentionManager):
    """Blocks of budgeted requests, with hits and side copies where caching is on."""

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        """As the base class; ``kv_cache_spec.policy`` says who votes when."""
        super().__init__(kv_cache_spec, **kwargs)
        self._ledger = ledger_of(self.block_pool)
        self._reuse: dict[str, Reuse] = {}
        self._sharing: set[str] = set()
        self._uncached: set[str] = set()  # whose prompt grows
        self._ends: dict[str, int] = {}  # tokens after the last scheduled step
        self._hits: dict[str, int] = {}  # blocks of a new request that are hits
        # Filled by a scheduling pass, emptied at its end.
        self._leaving: dict[str, list[KVCacheBlock]] = {}
        self._due: dict[str, tuple[list[BlockHash], list[KVCacheBlock]]] = {}
        self._verbatim: set[int] = set()
        # Kept across passes: the state that the last step ends with, and side copies.
        self._reached: dict[str, BlockHash] = {}
        self._copied: dict[str, list[KVCacheBlock]] = {}

    # -- lookup ----------------------------------------------------------------------

    def shares_blocks(self, request_id: str) -> bool:
        """Whether its blocks are others' as well, as it never votes or evicts."""
        return request_id in self._sharing

    def meet_request(self, request: Request) -> None:
        """Learn the request's numbers, and that a lookup is for it."""
        super().meet_request(request)
        if not self.enable_caching:
            return
        request_id, prompt_len = request.request_id, request.num_prompt_tokens
        reuse = self._reuse.get(request_id)
        if reuse is None or reuse.prompt_len != prompt_len:
            reuse = reuse_of(self.policy_of(request), self.block_size, prompt_len)
            self._reuse[request_id] = reuse
        if request_id not in self.req_to_blocks:
            whole = prompt_len + request.max_tokens
            # A prompt that grows (streaming input) has no fixed end, and so no numbers.
            if request.resumable:
                self._uncached.add(request_id)
            elif reuse.never_overwrites(whole):
                self._sharing.add(request_id)
        self._ledger.asking = Asking(
            None if request.resumable else reuse, request_id in self._sharing
        )

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest snapshot or run of raw blocks; see the base class."""
        hashes = resolve_block_hashes(
            block_hashes, block_pool.hash_block_size, kv_cache_spec.block_size
        )
        rows, length = find_hit(
            block_pool, kv_cache_group_ids, hashes, max_length, alignment_tokens
        )
        by_group = tuple(
            [row[i] for row in rows] for i in range(len(kv_cache_group_ids))
        )
        return by_group, length

    # -- allocation ------------------------------------------------------------------

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Free blocks that the request needs; see the base class for the arguments.

        A private request needs a free block for every hit: the hit itself, or its copy.
        """
        missing = super().get_num_blocks_to_allocate(
            request_id, num_tokens, (), *args, **kwargs
        )
        if request_id not in self._sharing:
            return missing
        held = sum(not self._is_taken(block) for block in new_computed_blocks)
        return max(missing - held, 0)

    def _is_taken(self, block: KVCacheBlock) -> bool:
        """Whether a sharing request's hit costs a free block."""
        return block.ref_cnt == 0 or block.block_id in self._ledger.private

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Hold the hits; see the base class for the arguments.

        Blocks to copy into are taken in `allocate_new_blocks`, once the other groups
        hold theirs: taking one may evict what nobody holds.
        """
        row = self.req_to_blocks[request_id]
        assert not row, "hits come before anything else"
        self.block_pool.touch(new_computed_blocks)
        row.extend(new_computed_blocks)
        self._hits[request_id] = len(row)
        self.num_cached_block[request_id] = len(row)
        self._ends[request_id] = num_local_computed_tokens

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Give the request the blocks it lacks; note what this step overwrites."""
        if hits := self._hits.pop(request_id, 0):
            self._make_private(request_id, hits)
        new_blocks = super().allocate_new_blocks(
            request_id, num_tokens, num_tokens_main_model
        )
        if not self.enable_caching:
            return new_blocks
        if request_id not in self._sharing:
            self._note_writes(request_id, num_tokens, bool(new_blocks or hits))
        self._ends[request_id] = num_tokens
        return new_blocks

    def _note_writes(self, request_id: str, num_tokens: int, grown: bool) -> None:
        """Note whose blocks these are, and what must be copied before the step."""
        row, reuse = self.req_to_blocks[request_id], self._reuse[request_id]
        if grown:
            self._ledger.private.update(block.block_id for block in row)
        before = reuse.overwritten(self._ends.get(request_id, 0))
        now = reuse.overwritten(num_tokens)
        if grown or now > before:
            hashed = [block for block in row[:now] if block.block_hash is not None]
            if hashed:
                self._leaving[request_id] = hashed
        if prefix := self._reached.pop(request_id, None):
            keys = snapshot_keys(prefix, reuse)
            self._due[request_id] = (keys, row[: reuse.live_blocks])

    def _make_private(self, request_id: str, hits: int) -> None:
        """Take hits over, or copy those that another request holds."""
        row, shares = self.req_to_blocks[request_id], request_id in self._sharing
        for i, block in enumerate(row[:hits]):
            if shares and block.block_id not in self._ledger.private:
                continue
            copy = block
            if block.ref_cnt > 1:
                (copy,) = self.block_pool.get_new_blocks(1)
                row[i] = copy
            elif is_snapshot(block):
                continue  # taken over as it is
            else:
                block.ref_cnt += 1
            # Both ends are held until the copy has run; the source by the hit itself.
            copy.ref_cnt += 1
            self._copy(block, copy, verbatim=is_snapshot(block))

    def _copy(
        self, source: KVCacheBlock, copy: KVCacheBlock, *, verbatim: bool
    ) -> None:
        """Let the worker copy pages before the forward; the pool takes both back."""
        self._pending_cow_copies.append((source, copy))
        if verbatim:
            self._verbatim.add(copy.block_id)

    # -- hashing ---------------------------------------------------------------------

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Put the request's raw blocks under their hashes; see the base class.

        Args:
            request: The request.
            num_tokens: Tokens after this step, or fewer.
            retention_interval: For sliding windows.
            replay_boundaries: For sliding windows.

        """
        request_id, size = request.request_id, self.block_size
        if not self.enable_caching or request_id in self._uncached:
            return
        reuse, end = self._reuse[request_id], self._ends[request_id]
        num_hashed = len(request.block_hashes) * self.block_pool.hash_block_size
        if end <= min(num_hashed, reuse.prompt_len - 1) and reuse.is_snapshot(end):
            hashes = resolve_block_hashes(
                request.block_hashes, self.block_pool.hash_block_size, size
            )
            self._reached[request_id] = hashes[end // size - 1]
        done = self.num_cached_block.get(request_id, 0)
        full = min(num_tokens, num_hashed, reuse.raw_tokens) // size
        if done >= full or num_tokens < reuse.policy.sinks:
            return
        if done < reuse.overwritten(end):  # filled and overwritten in one step
            self.num_cached_block[request_id] = reuse.raw_tokens // size  # no more
            return
        row = self.req_to_blocks[request_id]
        self.block_pool.cache_full_blocks(
            request=request,
            blocks=row,
            num_cached_blocks=done,
            num_full_blocks=full,
            block_size=size,
            kv_cache_group_id=self.kv_cache_group_id,
        )
        self._ledger.fresh.update(block.block_id for block in row[done:full])
        self.num_cached_block[request_id] = full

    # -- the end of a scheduling pass ------------------------------------------------

    def take_pending_cow_copies(self) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        """All copies of the step, after its last allocation: none preempts anybody."""
        for request_id, blocks in self._leaving.items():
            # From the end of a chain, so that its root stays in the LRU list longest.
            for block in reversed(blocks):
                self._move_out(request_id, block)
        for keys, live in self._due.values():
            self._keep_snapshot(keys, live)
        self._leaving, self._due = {}, {}
        self._ledger.fresh.clear()
        return super().take_pending_cow_copies()

    def make_block_copy(self, source: KVCacheBlock, copy: KVCacheBlock) -> PageCopy:
        """What the worker is told of a pending copy."""
        return PageCopy(
            source.block_id,
            copy.block_id,
            self.kv_cache_group_id,
            keeps_votes=self._is_verbatim(copy),
        )

    def _is_verbatim(self, copy: KVCacheBlock) -> bool:
        if copy.block_id not in self._verbatim:
            return False
        self._verbatim.discard(copy.block_id)
        return True

    def _move_out(self, request_id: str, block: KVCacheBlock) -> None:
        """Move a block's hash to a copy, before the block is overwritten."""
        key, pool = block.block_hash, self.block_pool
        if key is None:
            return
        size, verbatim = block.block_hash_num_tokens, is_snapshot(block)
        pool._remove_cached_block_hashes(block)
        if pool.cached_block_hash_to_block.get_one_block(key) is not None:
            return  # somebody holds the same
        if pool.get_num_free_blocks() == 0:
            pool._emit_block_removed_events([key])
            return
        (copy,) = pool.get_new_blocks(1)
        pool._insert_block_hash(key, copy, num_tokens=size)
        block.ref_cnt += 1
        self._copy(block, copy, verbatim=verbatim)
        self._copied.setdefault(request_id, []).append(copy)

    def _keep_snapshot(self, hashes: list[BlockHash], live: list[KVCacheBlock]) -> None:
        """Copy a request's live blocks under keys of all that it has read."""
        pool = self.block_pool
        keys = [
            make_block_hash_with_group_id(key, self.kv_cache_group_id) for key in hashes
        ]
        known = list(map(pool.cached_block_hash_to_block.get_one_block, keys))
        if all(known):
            self._use_last([block for block in known if block is not None])
            return
        if pool.get_num_free_blocks() < len(live):
            return
        for key, block, copy in zip(
            keys, live, pool.get_new_blocks(len(live)), strict=True
        ):
            pool._insert_block_hash(key, copy, num_tokens=None)  # see `is_snapshot`
            block.ref_cnt += 1
            self._copy(block, copy, verbatim=True)

    # -- the end of a prompt, and of a request ---------------------------------------

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Return the scratch, which stays cached: see the base class."""
        keep = self._bounds[request_id].steady_blocks
        before = self.req_to_blocks.get(request_id, ())[keep:]
        returned = request_id in self._scratch_returned
        super().remove_skipped_blocks(
            request_id, processed_computed_tokens, num_prompt_tokens
        )
        if not returned and request_id in self._scratch_returned:
            self._ledger.private.difference_update(b.block_id for b in before)
            # The blocks of a chain leave the LRU list from its end: the scratch holds
            # the end of the prompt, the side copies its beginning.
            self._use_last(self._copied.pop(request_id, []))

    def _use_last(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Make cached blocks that nobody holds the last to be evicted, the root last.

        Blocks that have been evicted since are left alone.
        """
        idle = [b for b in blocks if b.block_hash is not None and b.ref_cnt == 0]
        idle.sort(key=lambda block: block.block_hash_num_tokens or 0)
        self.block_pool.touch(idle)
        self.block_pool.free_blocks(reversed(idle))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request; see the base class.

        If it is preempted in the pass that put blocks under hashes, their tokens will
        never be computed.
        """
        blocks = super().pop_blocks_for_free(request_id)
        ids = {block.block_id for block in blocks}
        if uncomputed := ids & self._ledger.fresh:
            self.block_pool.evict_blocks(uncomputed)
            self._ledger.fresh -= uncomputed
        if request_id not in self._sharing:
            self._ledger.private -= ids
        for known in (
            *(self._reuse, self._ends, self._hits, self._leaving, self._due),
            *(self._reached, self._copied),
        ):
            known.pop(request_id, None)
        self._sharing.discard(request_id)
        self._uncached.discard(request_id)
        return blocks

    # -- chunks ----------------------------------------------------------------------

    def limit_chunk(self, request: Request, start: int, num_new_tokens: int) -> int:
        """Tokens of a step: few enough calls, and what it fills can be cached.

        See `plan.limit_chunk`, after a preemption, and `Reuse.chunk_end`.

        Args:
            request: The request.
            start: Tokens computed before the step.
            num_new_tokens: Tokens that the scheduler would read, at least 1.

        """
        prompt_len, policy = request.num_prompt_tokens, self.policy_of(request)
        num_new_tokens = limit_chunk(policy, start, num_new_tokens, prompt_len)
        if not self.enable_caching or num_new_tokens <= 1:
            return num_new_tokens
        reuse = reuse_of(policy, self.block_size, prompt_len)
        return reuse.chunk_end(start, start + num_new_tokens) - start
