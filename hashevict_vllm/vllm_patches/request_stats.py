"""Patches the engine's client: a policy's metrics see every request's progress.

Where: ``OutputProcessor._update_stats_from_output`` in
``vllm/v1/engine/output_processor.py``, which knows the request's prompt and what it has
generated, and `IterationStats`, which it fills, does not keep either by request. Why
there: every output of every engine passes it, in the process that serves ``/metrics``.
``_update_stats_from_finished`` and ``add_request`` beside it, for the request's budget.
And ``StatLoggerManager.__init__`` in ``vllm/v1/metrics/loggers.py``, for the logger
that reads them: a plugin of the group ``vllm.stat_logger_plugins`` would be made with
the policy off as well, and would switch statistics on where they are off.

Upstream fix: patches/*/request_stats.patch, ``IterationStats.request_progress`` and
``StatLoggerManager.more_factories``.
"""

from __future__ import annotations

import functools
from typing import Any

from hashevict_vllm.config import policy_of


def in_vllm() -> bool:
    """Whether vLLM has both extension points."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    return hasattr(StatLoggerManager, "more_factories")


def apply() -> None:
    """Patch once per process."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    if in_vllm():
        if make_logger not in StatLoggerManager.more_factories:
            StatLoggerManager.more_factories.append(make_logger)
        return
    if not hasattr(StatLoggerManager.__init__, "hashevict_stock"):
        StatLoggerManager.__init__ = _with_logger(StatLoggerManager.__init__)


def make_logger(vllm_config: Any, engine_indexes: list[int]) -> Any | None:
    """The policy's logger, or None with the policy off."""
    if not policy_of(vllm_config.additional_config).enabled:
        return None
    from hashevict_vllm.metrics.prometheus import KVPolicyStatLogger

    return KVPolicyStatLogger(vllm_config, engine_indexes)


def _with_logger(stock: Any) -> Any:
    @functools.wraps(stock)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, vllm_config, *args, **kwargs)
        if logger := make_logger(vllm_config, self.engine_indexes):
            self.stat_loggers.append(logger)
            _note_progress()

    __init__.hashevict_stock = stock  # type: ignore[attr-defined]
    return __init__


def _note_progress() -> None:
    """Patch the class once; not before a logger reads what it notes."""
    from vllm.v1.engine.output_processor import OutputProcessor

    stock = OutputProcessor._update_stats_from_output
    if hasattr(stock, "hashevict_stock"):
        return
    add, finish = (
        OutputProcessor.add_request,
        OutputProcessor._update_stats_from_finished,
    )

    @functools.wraps(add)
    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        add(self, request, *args, **kwargs)
        params = request.sampling_params
        state = self.request_states[request.request_id]
        state.extra_args = params.extra_args if params else None

    @functools.wraps(finish)
    def _update_stats_from_finished(
        self: Any, state: Any, reason: Any, stats: Any
    ) -> None:
        finish(self, state, reason, stats)
        if stats is not None:
            stats.finished_requests[-1].extra_args = state.extra_args

    @functools.wraps(stock)
    def _update_stats_from_output(
        self: Any, state: Any, output: Any, timestamp: Any, stats: Any
    ) -> None:
        if stats is None:
            return stock(self, state, output, timestamp, stats)
        preempted = state.stats.num_preemptions
        stock(self, state, output, timestamp, stats)
        if state.stats.num_generation_tokens:
            progress = (
                state.request_id,
                state.prompt_len,
                state.stats.num_generation_tokens,
                len(output.new_token_ids),
                state.stats.num_preemptions - preempted,
                state.extra_args,
            )
            stats.__dict__.setdefault("request_progress", []).append(progress)
        stats.request_states = self.request_states

    _update_stats_from_output.hashevict_stock = stock  # type: ignore[attr-defined]
    OutputProcessor._update_stats_from_output = _update_stats_from_output
    OutputProcessor._update_stats_from_finished = _update_stats_from_finished
    OutputProcessor.add_request = add_request
