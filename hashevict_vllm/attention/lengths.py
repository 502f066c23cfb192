"""What the metadata builders of all devices ask of vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from hashevict_vllm.batch import current_extra_args, current_prompt_lens
from hashevict_vllm.request_budget import asked_budget

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def first_layer(vllm_config: VllmConfig, layer_names: list[str]) -> Any:
    """An attention layer of a builder's group."""
    return vllm_config.compilation_config.static_forward_context[layer_names[0]]


def host_prompt_lens(common: CommonAttentionMetadata) -> torch.Tensor | None:
    """Int [R], lengths of the prompts; None if vLLM does not tell the host."""
    lens = current_prompt_lens()
    if lens is None:
        lens = common.rswa_prefix_lens
    if lens is None or lens.device.type != "cpu":
        return None
    return lens[: common.num_reqs]


def own_budgets() -> dict[int, int]:
    """Budgets of the batch's requests that ask for one, by row."""
    asked = {row: asked_budget(args) for row, args in current_extra_args().items()}
    return {row: budget for row, budget in asked.items() if budget is not None}


def host_lens(common: CommonAttentionMetadata) -> torch.Tensor:
    """Int [R], tokens of the requests after the step, as the host knows them.

    They are exact, as there is no speculative decoding with a KV policy
    (``seq_lens_cpu_upper_bound`` in vllm/v1/attention/backend.py).

    Raises:
        RuntimeError: If the host does not know them.

    """
    lens = common.seq_lens_cpu_upper_bound
    if common.seq_lens.device.type == "cpu":
        lens = common.seq_lens
    if lens is None:
        raise RuntimeError("vLLM told the host no lengths of the step's requests.")
    return lens[: common.num_reqs]
