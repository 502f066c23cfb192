"""A worker on paper: real scheduler and managers, pages of hashes instead of K and V.

Every slot holds what made it: a hash of the token prefix, of the votes cast on it, and
whether it is marked as evicted. `LiveSet` says, from the definition of the policy
alone, what a request's slots must hold after n tokens; the worker follows the
scheduler's output as vLLM's model runners do (append-only rows, copies before the
forward), reads what its rows hold and complains when that is not what the prefix makes.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from vllm.distributed.kv_events import AllBlocksCleared, BlockStored
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_block_hash,
    get_request_block_hasher,
    init_none_hash,
    make_block_hash_with_group_id,
    maybe_convert_block_hash,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from hashevict_vllm.cache.lookup import snapshot_keys
from hashevict_vllm.cache.prefix import PrefixCachingManager
from hashevict_vllm.cache.spec import BudgetedAttentionSpec
from hashevict_vllm.request_budget import KEY, asked_budget, policy_with
from hashevict_vllm.resolved import ResolvedKVPolicy
from hashevict_vllm.reuse import reuse_of


class Slot(NamedTuple):
    """One slot: what it holds of which prefix, votes cast on it, marked as evicted."""

    content: int
    votes: int
    marked: bool


POISON = Slot(-1, -1, True)


def prefixes(tokens: list[int]) -> list[int]:
    """A number for every prefix; the i-th covers token i."""
    seen, numbers = 0, []
    for token in tokens:
        seen = hash((seen, token))
        numbers.append(seen)
    return numbers


class LiveSet:
    """What the slots of a request hold, token by token, from the policy's definition.

    Attributes:
        slots: All that it has written, scratch included.
        used: How many of them are live or open scratch.

    """

    def __init__(self, policy: ResolvedKVPolicy, prompt_len: int) -> None:
        self.policy, self.prompt_len = policy, prompt_len
        self.slots: list[Slot] = []
        self.used = self.t = 0

    def read(self, numbers: list[int], end: int) -> None:
        """Take tokens up to ``end``; ``numbers`` as of `prefixes`."""
        while self.t < end:
            self._read_one(numbers[self.t])
            self.t += 1

    def _read_one(self, number: int) -> None:
        policy, t = self.policy, self.t
        held = t < self.prompt_len and policy.segment > 1
        if held or self.used < policy.budget:
            self._write(self.used, number)
            self.used += 1
        else:
            seen = hash(tuple(self.slots[: policy.budget]))
            self._write(hash((number, seen)) % policy.budget, number)
        if policy.voters(t, t + 1, self.prompt_len):
            for i, slot in enumerate(self.slots[: self.used]):
                self.slots[i] = slot._replace(votes=hash((slot.votes, number)))
        ends = (t + 1) % policy.segment == 0 or t + 1 == self.prompt_len
        if held and ends and self.used > policy.budget:
            self._reduce(number)

    def _write(self, slot: int, number: int) -> None:
        self.slots[slot : slot + 1] = [Slot(number, 0, False)]

    def _reduce(self, number: int) -> None:
        """Survivors depend on all slots and their votes; losers are left, marked."""
        seen, budget = hash(tuple(self.slots[: self.used])), self.policy.budget
        for i, slot in enumerate(self.slots):
            if i < budget:
                self.slots[i] = Slot(hash((number, seen, i)), hash((seen, i)), False)
            else:
                self.slots[i] = slot._replace(marked=True)
        self.used = budget


@dataclass
class Row:
    """A request in the worker's batch."""

    blocks: list[int]
    prompt_len: int
    done: int
    policy: ResolvedKVPolicy


@dataclass
class Planned:
    """A scheduled step that has not run yet, and what its pass left behind."""

    output: Any
    cached: list[tuple[Any, int]]
    idle: set[int]
    resumed: dict[str, list[int]]


@dataclass
class PaperEngine:
    """Scheduler and worker in step, the worker ``lag`` steps behind.

    Attributes:
        config: A vLLM configuration, of which the scheduler reads sizes.
        policy: The resolved policy.
        block_size: N.
        num_blocks: Blocks of the pool, with vLLM's null block.
        lag: Steps that are planned before the first of them has run.
        budgets: That requests may ask for.
        hits: Tokens of hits, by request, at its first admission.
        preempted_fresh: Preemptions in the pass that had put blocks under hashes.

    """

    config: Any
    policy: ResolvedKVPolicy
    block_size: int
    num_blocks: int
    lag: int = 0
    budgets: tuple[int | None, ...] = (None,)
    hits: dict[str, int] = field(default_factory=dict)
    preempted_fresh: int = 0

    def __post_init__(self) -> None:
        init_none_hash(sha256)
        self.policies = {
            asked: policy_with(self.policy, asked) for asked in self.budgets
        }
        stock = FullAttentionSpec(
            block_size=self.block_size,
            num_kv_heads=1,
            head_size=8,
            dtype=torch.float32,
        )
        spec = BudgetedAttentionSpec.from_stock(stock, self.policy)
        self.config.cache_config.num_gpu_blocks = self.num_blocks
        make = AsyncScheduler if self.lag else Scheduler
        self.scheduler = make(
            self.config,
            KVCacheConfig(
                num_blocks=self.num_blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            StructuredOutputManager(self.config),
            block_size=self.block_size,
            log_stats=True,
        )
        (manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.manager: PrefixCachingManager = manager
        self.pool = manager.block_pool
        self.pages = [[POISON] * self.block_size for _ in range(self.num_blocks)]
        self.rows: dict[str, Row] = {}
        self.tokens: dict[str, list[int]] = {}
        self.requests: dict[str, Request] = {}
        self.made_by: dict[Any, list[Slot]] = {}
        self.waiting: deque[Planned] = deque()
        self.hasher = get_request_block_hasher(self.block_size, sha256)
        stock_preempt = self.scheduler._preempt_request

        def preempt(request: Request, *args: Any, **kwargs: Any) -> None:
            rows = self.manager.req_to_blocks.get(request.request_id, ())
            fresh = self.manager._ledger.fresh
            self.preempted_fresh += any(b.block_id in fresh for b in rows)
            stock_preempt(request, *args, **kwargs)

        self.scheduler._preempt_request = preempt
        self.announced: set[Any] = set()
        self.scheduler.kv_event_publisher.publish = self._hear

    # -- what a user does ----------------------------------------------------------

    def add(
        self,
        name: str,
        prompt: list[int],
        max_tokens: int,
        priority: int = 0,
        budget: int | None = None,
    ) -> None:
        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, extra_args={KEY: budget}
        )
        params.update_from_generation_config({}, 0)
        request = Request(
            name,
            list(prompt),
            params,
            None,
            priority=priority,
            arrival_time=float(len(self.tokens)),
            block_hasher=self.hasher,
        )
        self.tokens[name], self.requests[name] = list(prompt), request
        self.scheduler.add_request(request)

    def abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    @property
    def unfinished(self) -> list[str]:
        return list(self.scheduler.requests)

    def answer(self, prompt: list[int], max_tokens: int) -> list[int]:
        """What any engine must generate."""
        tokens = list(prompt)
        for _ in range(max_tokens):
            tokens.append(next_token(prefixes(tokens)[-1]))
        return tokens[len(prompt) :]

    # -- a step --------------------------------------------------------------------

    def step(self) -> None:
        """Plan a step; run the oldest planned one."""
        output = self.scheduler.schedule()
        for request in output.scheduled_new_reqs:
            self.hits.setdefault(request.req_id, request.num_computed_tokens)
        cached = [
            (key, block.block_id)
            for key, entry in self.pool.cached_block_hash_to_block._cache.items()
            for block in (entry.values() if isinstance(entry, dict) else [entry])
        ]
        idle = {
            block.block_id
            for block in self.pool.blocks
            if block.ref_cnt == 0 and block.block_hash is None and not block.is_null
        }
        # Output of a step that was in flight at a preemption may have been dropped.
        resumed = {
            name: list(self.requests[name].all_token_ids)
            for name in output.scheduled_cached_reqs.resumed_req_ids
        }
        self.waiting.append(Planned(output, cached, idle, resumed))
        if len(self.waiting) > self.lag or not output.num_scheduled_tokens:
            self._run_all() if not output.num_scheduled_tokens else self._run()

    def _run_all(self) -> None:
        while self.waiting:
            self._run()

    def _run(self) -> None:
        planned = self.waiting.popleft()
        output = planned.output
        self.tokens.update(planned.resumed)
        self._update_rows(output)
        self._copy(output.kv_cache_block_copies or ())
        for block in planned.idle:
            self.pages[block] = [POISON] * self.block_size
        sampled = {
            name: self._forward(name, count)
            for name, count in output.num_scheduled_tokens.items()
        }
        self._check_cached(planned.cached)
        names = list(sampled)
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: i for i, name in enumerate(names)},
                sampled_token_ids=[sampled[name] for name in names],
            ),
        )

    def _update_rows(self, output: Any) -> None:
        for new in output.scheduled_new_reqs:
            (blocks,) = new.block_ids
            counts = (len(new.prompt_token_ids), new.num_computed_tokens)
            policy = self.policies[asked_budget(new.sampling_params.extra_args)]
            self.rows[new.req_id] = Row(list(blocks), *counts, policy)
        old = output.scheduled_cached_reqs
        for name, blocks, done in zip(
            old.req_ids, old.new_block_ids, old.num_computed_tokens, strict=True
        ):
            row = self.rows[name]
            if name in old.resumed_req_ids:
                row.blocks = []
            row.blocks += blocks[0] if blocks else []
            row.done = done

    def _copy(self, copies: Any) -> None:
        sources = [list(self.pages[copy.src_block_id]) for copy in copies]
        for copy, page in zip(copies, sources, strict=True):
            if not copy.keeps_votes:
                page = [slot._replace(votes=0, marked=False) for slot in page]
            self.pages[copy.dst_block_id] = page

    def _forward(self, name: str, count: int) -> list[int]:
        """Check what the request starts from, and write what its tokens make."""
        row, tokens = self.rows[name], self.tokens[name]
        end = row.done + count
        numbers = prefixes(tokens[:end])
        made = LiveSet(row.policy, row.prompt_len)
        made.read(numbers, row.done)
        found = list(self._slots(row))[: made.used]
        reuse = reuse_of(row.policy, self.block_size, row.prompt_len)
        if reuse.never_overwrites(row.prompt_len + self.requests[name].max_tokens):
            # It reads K and V alone, and so shares what others have voted on, or keep
            # no more.
            found = [slot._replace(votes=0, marked=False) for slot in found]
        assert found == made.slots[: made.used], f"{name} at {row.done}"
        before = list(made.slots)
        made.read(numbers, end)
        for i, slot in enumerate(made.slots):
            if i >= len(before) or slot != before[i]:  # scratch may be another's by now
                block, place = divmod(i, self.block_size)
                self.pages[row.blocks[block]][place] = slot
        self._remember(name, numbers)
        row.done = end
        if end < len(tokens):
            return []
        token = next_token(numbers[-1])
        tokens.append(token)
        return [token]

    def _slots(self, row: Row) -> Iterator[Slot]:
        for block in row.blocks:
            yield from self.pages[block]

    def _hear(self, batch: Any) -> None:
        """Follow events as a router does."""
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self.announced.clear()
            elif isinstance(event, BlockStored):
                self.announced.update(event.block_hashes)
            else:
                self.announced.difference_update(event.block_hashes)
        if not self.waiting:
            held = self.pool.cached_block_hash_to_block._cache
            assert self.announced <= {
                maybe_convert_block_hash(get_block_hash(key)) for key in held
            }

    # -- what lies under hashes ------------------------------------------------------

    def _remember(self, name: str, numbers: list[int]) -> None:
        """What the hashes of these tokens stand for."""
        size, segment = self.block_size, self.policy.segment
        hashes = self.requests[name].block_hashes[: len(numbers) // self.block_size]
        for i, key in enumerate(hashes):
            if make_block_hash_with_group_id(key, 0) in self.made_by:
                continue
            end = (i + 1) * size
            raw = [Slot(number, 0, False) for number in numbers[end - size : end]]
            self.made_by[make_block_hash_with_group_id(key, 0)] = raw
            if segment == 1 or end % segment:
                continue
            for policy in self.policies.values():
                self._remember_snapshot(key, policy, numbers, end)

    def _remember_snapshot(
        self, key: Any, policy: ResolvedKVPolicy, numbers: list[int], end: int
    ) -> None:
        size, reuse = self.block_size, reuse_of(policy, self.block_size, end + 1)
        if end <= policy.budget:
            return
        made = LiveSet(policy, end + 1)
        made.read(numbers, end)
        for row, snapshot in enumerate(snapshot_keys(key, reuse)):
            slots = made.slots[: made.used][row * size : (row + 1) * size]
            self.made_by[make_block_hash_with_group_id(snapshot, 0)] = slots

    def _check_cached(self, cached: list[tuple[Any, int]]) -> None:
        """Every page under a hash is what its prefix makes."""
        for key, block in cached:
            expected, page = self.made_by[key], self.pages[block]
            if (
                self.pool.blocks[block].block_hash_num_tokens is None
                and expected[0].votes
            ):
                assert page[: len(expected)] == expected
            assert [slot.content for slot in page[: len(expected)]] == [
                slot.content for slot in expected
            ], f"block {block} does not hold what its hash says"


def next_token(number: int) -> int:
    """The token that follows a prefix: few, so that answers are prefixes too."""
    return 100 + hash(("next", number)) % 2


def fork(rng: random.Random, known: list[list[int]], longest: int) -> list[int]:
    """A prompt: new, known, cut or extended."""
    base = list(rng.choice(known)) if known and rng.random() < 0.85 else []
    base = base[: rng.randint(0, len(base))] if rng.random() < 0.3 else base
    fresh = [rng.randint(0, 50) for _ in range(rng.randint(0 if base else 1, 24))]
    return (base + fresh)[:longest]
