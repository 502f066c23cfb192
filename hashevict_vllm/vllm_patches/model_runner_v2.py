"""Patches model runner V2 of GPUs: prompt lengths reach the builders, on the host.

Where: ``GPUModelRunner.prepare_inputs`` in ``vllm/v1/worker/gpu/model_runner.py``,
which makes the step's ``InputBatch``. It fills ``prompt_lens`` for R-SWA models only,
and on the device; the model's state passes the field on as
``CommonAttentionMetadata.rswa_prefix_lens``. The runner keeps the lengths on the host
as well (``RequestState.prompt_len.np``), so nothing is copied or waited for. Batches
that vLLM makes up to warm up or to capture graphs keep None.

Upstream fix: patches/*/model_runner_v2.patch, which also says so in
``always_passes_prompt_lens``.
"""

from __future__ import annotations

from typing import Any

import torch


def in_vllm() -> bool:
    """Whether model runner V2 passes the prompt lengths of all models."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    return getattr(GPUModelRunner, "always_passes_prompt_lens", False)


def apply() -> None:
    """Patch once per process."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    stock = GPUModelRunner.prepare_inputs
    if in_vllm() or hasattr(stock, "hashevict_stock"):
        return

    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = stock(self, *args, **kwargs)
        if batch.prompt_lens is None:
            lengths = self.req_states.prompt_len.np[batch.idx_mapping_np]
            batch.prompt_lens = torch.from_numpy(lengths)
        return batch

    prepare_inputs.hashevict_stock = stock  # type: ignore[attr-defined]
    GPUModelRunner.prepare_inputs = prepare_inputs
