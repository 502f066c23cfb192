"""Patches `CPUModelRunner`: a request with ``seed`` whose prompt takes several steps.

Each step samples for every request; what it draws for a prompt that is not finished is
discarded, and ``_bookkeeping_sync`` (vllm/v1/worker/gpu_model_runner.py) takes the draw
back by the generator's offset. A CPU's generator has none, and the engine dies. Here
such a request's generator is put aside while the step samples, so nothing is drawn
from it: the same tokens as from a prompt read in one step.

Upstream fix: patches/*/cpu_generators.patch, ``_put_generators_aside``.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


def in_vllm() -> bool:
    """Whether vLLM spares the generators of unfinished prompts."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    return hasattr(GPUModelRunner, "_put_generators_aside")


def apply() -> None:
    """Patch once per process."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if in_vllm() or hasattr(CPUModelRunner._sample, "hashevict_stock"):
        return
    CPUModelRunner._sample = _without_unfinished(CPUModelRunner._sample)
    CPUModelRunner._bookkeeping_sync = _put_back(CPUModelRunner._bookkeeping_sync)


def _without_unfinished(stock: Any) -> Any:
    @functools.wraps(stock)
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        unfinished = np.nonzero(self.discard_request_mask.np[: batch.num_reqs])[0]
        self._generators_aside = {
            int(row): batch.generators.pop(int(row))
            for row in unfinished
            if int(row) in batch.generators
        }
        return stock(self, *args, **kwargs)

    _sample.hashevict_stock = stock  # type: ignore[attr-defined]
    return _sample


def _put_back(stock: Any) -> Any:
    @functools.wraps(stock)
    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, *args, **kwargs)
        self.input_batch.generators.update(self._generators_aside)
        return result

    return _bookkeeping_sync
