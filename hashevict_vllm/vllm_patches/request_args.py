"""Patches both model runners: ``extra_args`` of requests reach the metadata builders.

A request's own KV budget is among them, and what a step evicts depends on it.

Where: ``GPUModelRunner.execute_model`` of V1 (also the CPU's) and V2, which sees every
request come and go; ``_build_attention_metadata`` of V1 and ``prepare_inputs`` of V2,
which know the rows of the batch. Why then: the batch is final, and its metadata are
built next. A step without such a request pays nothing.

Upstream fix: patches/*/request_args.patch, ``batch_extra_args``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from hashevict_vllm.batch import EXTRA_ARGS, NOBODY, passes_extra_args


def in_vllm() -> bool:
    """Whether vLLM's model runners pass them on."""
    return passes_extra_args()


def apply() -> None:
    """Patch both runners once per process."""
    if in_vllm():
        return
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

    if hasattr(RunnerV1.execute_model, "hashevict_stock"):
        return
    for runner in (RunnerV1, RunnerV2):
        runner.execute_model = _noting(runner.execute_model)
    RunnerV1._build_attention_metadata = _with_rows(RunnerV1._build_attention_metadata)
    RunnerV2.prepare_inputs = _with_rows_of_batch(RunnerV2.prepare_inputs)


def _noting(stock: Any) -> Any:
    @functools.wraps(stock)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kw: Any) -> Any:
        known: dict[str, Any] = self.__dict__.setdefault("_extra_args", {})
        for request_id in scheduler_output.finished_req_ids:
            known.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            if new.sampling_params and new.sampling_params.extra_args:
                known[new.req_id] = new.sampling_params.extra_args
        try:
            return stock(self, scheduler_output, *args, **kw)
        finally:
            EXTRA_ARGS.set(NOBODY)

    execute_model.hashevict_stock = stock  # type: ignore[attr-defined]
    return execute_model


def _note_rows(runner: Any, request_ids: Sequence[str]) -> None:
    known = runner.__dict__.get("_extra_args")
    if not known:
        return
    rows = enumerate(request_ids)
    EXTRA_ARGS.set({row: known[name] for row, name in rows if name in known})


def _with_rows(stock: Any) -> Any:
    @functools.wraps(stock)
    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Batches that vLLM makes up have no requests, and tell no counts.
        if kwargs.get("num_scheduled_tokens") is not None:
            _note_rows(self, self.input_batch.req_ids)
        return stock(self, *args, **kwargs)

    return _build_attention_metadata


def _with_rows_of_batch(stock: Any) -> Any:
    @functools.wraps(stock)
    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = stock(self, *args, **kwargs)
        _note_rows(self, batch.req_ids)
        return batch

    return prepare_inputs
