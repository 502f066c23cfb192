"""Patches `GPUModelRunner` (V1, also the CPU's): prompt lengths reach the builders.

Where: ``GPUModelRunner._build_attention_metadata`` in
``vllm/v1/worker/gpu_model_runner.py``. It fills
``CommonAttentionMetadata.rswa_prefix_lens`` with the prompt lengths for R-SWA models
only (`model_runner_v2` does for model runner V2 what this does for V1). Why then: the
batch is final, and the metadata builders need the lengths during this call only.

Upstream fix: patches/*/model_runner.patch fills the field always, and says so in
``always_passes_prompt_lens``.
"""

from __future__ import annotations

from typing import Any

from hashevict_vllm.batch import PROMPT_LENS


def in_vllm() -> bool:
    """Whether model runner V1 passes the prompt lengths itself."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    return getattr(GPUModelRunner, "always_passes_prompt_lens", False)


def apply() -> None:
    """Patch once per process."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if in_vllm():
        return
    stock = GPUModelRunner._build_attention_metadata
    if hasattr(stock, "hashevict_stock"):
        return

    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = PROMPT_LENS.set(self.input_batch.num_prompt_tokens_cpu_tensor)
        try:
            return stock(self, *args, **kwargs)
        finally:
            PROMPT_LENS.reset(token)

    _build_attention_metadata.hashevict_stock = stock  # type: ignore[attr-defined]
    GPUModelRunner._build_attention_metadata = _build_attention_metadata
