"""Blocks per request: what a budgeted request needs, and when scratch goes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from hashevict_vllm.cache.bounds import BlockBounds, bounds_of
from hashevict_vllm.plan import longest_held
from hashevict_vllm.request_budget import asked_budget, policy_with
from hashevict_vllm.resolved import ResolvedKVPolicy

logger = init_logger("vllm.hashevict_vllm.cache.manager")

LONGER_THAN_A_SEGMENT = (
    "Prompts longer than %d tokens are cut back to the budget on the way, before their "
    "end has been read and says what it asks for; "
    "--kv-policy-config.segment prompt holds them whole, at the cost of blocks for the "
    "whole prompt while it is read."
)
"""Logged once for every such number of tokens."""


class BudgetedAttentionManager(SingleTypeKVCacheManager):
    """Bounds a request to C + S slots while its prompt is read, to C afterwards.

    What is cached, and how it is found, `hashevict_vllm.cache.prefix` adds.

    Lengths follow from token counts alone, as the worker's plan does
    (`hashevict_vllm.plan`): after x tokens of a prompt of P, at most
    min(x, C + S) slots are in use; after the prompt, min(x, C). So the scratch is freed
    once, when the last prompt token has been processed, and the table never grows past
    ceil(C / N) again: the worker's append-only rows stay valid.
    """

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        """As the base class; ``kv_cache_spec.policy`` bounds what a request holds."""
        super().__init__(kv_cache_spec, **kwargs)
        self._policy: ResolvedKVPolicy = kv_cache_spec.policy
        self._bounds: dict[str, BlockBounds] = {}
        self._prompt_len: dict[str, int] = {}
        self._scratch_returned: set[str] = set()

    def meet_request(self, request: Request) -> None:
        """Learn what bounds a request, before its blocks are looked up or counted.

        Called by `hashevict_vllm.vllm_patches.kv_cache_manager` before any other
        method, also for one that was preempted, whose output is no prompt.
        """
        request_id = request.request_id
        self._prompt_len[request_id] = request.num_prompt_tokens
        if request_id not in self._bounds:
            policy = self.policy_of(request)
            self._bounds[request_id] = bounds_of(policy, self.block_size)
            held = longest_held(policy)
            if policy.votes and request.num_prompt_tokens > held:
                logger.warning_once(LONGER_THAN_A_SEGMENT, held, scope="process")

    def policy_of(self, request: Request) -> ResolvedKVPolicy:
        """The policy, with the budget that the request asks for."""
        params = request.sampling_params
        asked = asked_budget(params.extra_args) if params else None
        return policy_with(self._policy, asked)

    def shares_blocks(self, request_id: str) -> bool:
        """Whether its blocks are others' as well, as it never votes or evicts."""
        return False

    def _required_blocks(self, request_id: str, num_tokens: int) -> int:
        """Blocks a request needs to have ``num_tokens`` tokens computed."""
        bounds = self._bounds[request_id]
        after = bounds.decode_blocks(num_tokens)
        if request_id in self._scratch_returned:
            return after
        prompt = min(num_tokens, self._prompt_len[request_id])
        return max(after, bounds.prefill_blocks(prompt))

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Return the scratch once the whole prompt has been processed.

        Called by ``KVCacheManager.allocate_slots`` before each allocation.

        Args:
            request_id: The request.
            processed_computed_tokens: Tokens whose step has finished.
            num_prompt_tokens: Length of the original prompt, which is known already.

        """
        if (
            processed_computed_tokens < self._prompt_len[request_id]
            or request_id in self._scratch_returned
        ):
            return
        self._scratch_returned.add(request_id)
        blocks = self.req_to_blocks[request_id]
        keep = self._bounds[request_id].steady_blocks
        scratch = blocks[keep:]
        del blocks[keep:]
        self.block_pool.free_blocks(reversed(scratch))

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks missing for ``num_tokens``; see the base class for the arguments."""
        assert not new_computed_blocks, "hits are cache/prefix.py's business"
        held = len(self.req_to_blocks.get(request_id, ()))
        return max(self._required_blocks(request_id, num_tokens) - held, 0)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Give the request the blocks it lacks for ``num_tokens``."""
        blocks = self.req_to_blocks[request_id]
        missing = self._required_blocks(request_id, num_tokens) - len(blocks)
        if missing <= 0:
            return []
        new_blocks = self.block_pool.get_new_blocks(missing)
        blocks.extend(new_blocks)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new_blocks)
        return new_blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request (finished, aborted or preempted)."""
        self._bounds.pop(request_id, None)
        self._prompt_len.pop(request_id, None)
        self._scratch_returned.discard(request_id)
        return super().pop_blocks_for_free(request_id)

    @property
    def has_positionally_stable_blocks(self) -> bool:
        """Slots are overwritten by later tokens."""
        return False
