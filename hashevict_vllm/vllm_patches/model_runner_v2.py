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

from typing import TYPE_CHECKING, Any

import torch

from hashevict_vllm.config import ADDITIONAL_CONFIG_KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def in_vllm() -> bool:
    """Whether model runner V2 passes the prompt lengths of all models."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    return getattr(GPUModelRunner, "always_passes_prompt_lens", False)


def _has_policy(vllm_config: VllmConfig) -> bool:
    """Whether a policy is named; asked in every step, and so not read."""
    additional = vllm_config.additional_config
    return isinstance(additional, dict) and ADDITIONAL_CONFIG_KEY in additional


def apply() -> None:
    """Patch once per process."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    stock = GPUModelRunner.prepare_inputs
    if not in_vllm() and not hasattr(stock, "hashevict_stock"):
        GPUModelRunner.prepare_inputs = wrap(stock)


def wrap(stock: Any) -> Any:
    """``prepare_inputs`` whose batches of requests have prompt lengths."""

    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = stock(self, *args, **kwargs)
        if batch.prompt_lens is None and _has_policy(self.vllm_config):
            lengths = self.req_states.prompt_len.np[batch.idx_mapping_np]
            batch.prompt_lens = torch.from_numpy(lengths)
        return batch

    prepare_inputs.hashevict_stock = stock  # type: ignore[attr-defined]
    return prepare_inputs
