"""Patches `Scheduler`: managers may shorten a chunk.

Where: ``Scheduler._mamba_block_aligned_split`` of ``vllm/v1/core/sched/scheduler.py``,
which the scheduler asks, for running and for waiting requests, how many of a chunk's
tokens to read in this step, where ``need_mamba_block_aligned_split`` is set. Why there:
a prompt read in one step would fill its first blocks and overwrite them at once, and
the state at the end of a segment lasts until the next step only. And a request that
resumes after a preemption reads its output again, where whatever evicts takes an
attention call per token (`plan.limit_chunk`): thousands in one step would hold up all
other requests.

Upstream fix: patches/*/scheduler.patch, ``SingleTypeKVCacheManager.limit_chunk``.
"""

from __future__ import annotations

from typing import Any


def in_vllm() -> bool:
    """Whether vLLM's scheduler asks its managers."""
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    return hasattr(SingleTypeKVCacheManager, "limit_chunk")


def apply() -> None:
    """Patch once per process."""
    from vllm.v1.core.sched.scheduler import Scheduler

    stock = Scheduler._mamba_block_aligned_split
    if in_vllm() or hasattr(stock, "hashevict_stock"):
        return
    init = Scheduler.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self._limiting = [m for m in managers if hasattr(m, "limit_chunk")]
        self._stock_split = self.need_mamba_block_aligned_split
        self.need_mamba_block_aligned_split |= bool(self._limiting)

    def _mamba_block_aligned_split(
        self: Any,
        request: Any,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        computed = (num_new_local_computed_tokens, num_external_computed_tokens)
        start = request.num_computed_tokens + sum(computed)
        for manager in self._limiting:
            num_new_tokens = manager.limit_chunk(request, start, num_new_tokens)
        if not self._stock_split:
            return num_new_tokens
        return stock(self, request, num_new_tokens, *computed)

    _mamba_block_aligned_split.hashevict_stock = stock  # type: ignore[attr-defined]
    Scheduler.__init__ = __init__
    Scheduler._mamba_block_aligned_split = _mamba_block_aligned_split
