"""Patches `Scheduler`: the chunk of a request may be shortened before it is scheduled.

Where: ``Scheduler._reserve_prefill_lookahead`` in ``vllm/v1/core/sched/scheduler.py``,
the last word on the length of every chunk, of running and of waiting requests alike.
Why then: it is told the tokens computed so far, and no block has been allocated yet.

A request that resumes after a preemption reads its output again, where whatever evicts
takes one attention call per token (`plan.cut_chunk`). In one step thousands of calls
would hold up all other requests; in several steps these go on in between.

Upstream fix: patches/*/scheduler.patch, ``Scheduler.chunk_limits``.
"""

from __future__ import annotations

from typing import Any

from hashevict_vllm.attention.plan import limit_chunk


def in_vllm() -> bool:
    """Whether vLLM lets plugins shorten chunks."""
    from vllm.v1.core.sched.scheduler import Scheduler

    return hasattr(Scheduler, "chunk_limits")


def apply() -> None:
    """Patch once per process."""
    from vllm.v1.core.sched.scheduler import Scheduler

    stock = Scheduler._reserve_prefill_lookahead
    if in_vllm():
        if limit_rounds not in Scheduler.chunk_limits:
            Scheduler.chunk_limits.append(limit_rounds)
    elif not hasattr(stock, "hashevict_stock"):
        Scheduler._reserve_prefill_lookahead = _wrap(stock)


def _wrap(stock: Any) -> Any:
    def _reserve_prefill_lookahead(
        self: Any, request: Any, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        limited = limit_rounds(self, request, num_computed_tokens, num_new_tokens)
        return stock(self, request, num_computed_tokens, limited)

    _reserve_prefill_lookahead.hashevict_stock = stock  # type: ignore[attr-defined]
    return _reserve_prefill_lookahead


def limit_rounds(
    scheduler: Any, request: Any, num_computed_tokens: int, num_new_tokens: int
) -> int:
    """Tokens of a chunk, as many as `plan.limit_chunk` allows.

    Args:
        scheduler: Knows the specs of the KV cache.
        request: vLLM's request.
        num_computed_tokens: Its tokens before the chunk.
        num_new_tokens: What the scheduler would have.

    """
    if num_new_tokens <= 1:  # decode
        return num_new_tokens
    from hashevict_vllm.cache.spec import BudgetedAttentionSpec

    for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
        spec = manager.kv_cache_spec
        if isinstance(spec, BudgetedAttentionSpec):
            return limit_chunk(
                spec.policy,
                num_computed_tokens,
                num_new_tokens,
                request.num_prompt_tokens,
            )
    return num_new_tokens
