"""What stands in for xformers' operators, none of which runs on a CPU.

Its input is what the operators get: `Inputs`, checked by xformers itself, with the mask
that xformers materializes from the bias.
"""

from __future__ import annotations

from typing import Any

import torch
from xformers.ops.fmha import cutlass
from xformers.ops.fmha.common import Inputs

SEAM = "hashevict_vllm.attention.xformers.attend.memory_efficient_attention_forward"


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Any,
    scale: float,
) -> torch.Tensor:
    """Softmax attention in float32: [1, Mq, (G,) H, K] over [1, Mkv, (G,) H, K]."""
    inputs = Inputs(query, key, value, attn_bias, scale=scale)
    inputs.validate_inputs()
    objections = cutlass.FwOp.not_supported_reasons(inputs)
    assert objections == ["device=cpu (supported: {'cuda'})"], objections
    q, k, v = (x[0].flatten(1, -2).float() for x in (query, key, value))
    mask = attn_bias.materialize((len(q), len(k)))
    weights = (torch.einsum("qhd,khd->hqk", q, k) * scale + mask).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).view(query.shape).to(query.dtype)
