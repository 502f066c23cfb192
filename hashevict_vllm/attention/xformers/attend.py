"""Attention over gathered slots: the shapes that xformers wants."""

from __future__ import annotations

import torch
from xformers.ops.fmha import memory_efficient_attention_forward

from hashevict_vllm.attention.xformers.calls import Call


def gather(kv_cache: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the slots of a call out of their pages, whatever the pages' strides.

    Args:
        kv_cache: [B, Hkv, N, 2D], K in the first half of the last dimension.
        call: Says which slots.

    Returns:
        K and V, each [n, Hkv, D]: halves of one buffer.

    """
    kv = kv_cache.transpose(1, 2)[call.blocks, call.slots]
    k, v = kv.chunk(2, dim=-1)
    return k, v


def attend(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, scale: float
) -> torch.Tensor:
    """One call of xformers, which chooses the operator.

    Args:
        query: [T, Hq, D], the rows of the call.
        k: [n, Hkv, D].
        v: [n, Hkv, D].
        call: Its bias, and how it counts queries.
        scale: Softmax scale.

    Returns:
        [T, Hq, D].

    """
    tokens, heads, dim = len(query), k.shape[1], k.shape[2]
    grouped = query.view(tokens, heads, -1, dim)
    if call.folded:
        rows = grouped.transpose(1, 2).reshape(1, -1, heads, dim)
        result = memory_efficient_attention_forward(
            rows, k[None], v[None], call.bias, scale=scale
        )
        return result.view(tokens, -1, heads, dim).transpose(1, 2).flatten(1, 2)
    shape = (1, len(k), *grouped.shape[1:])
    # Groups share a key by a stride of 0, which operators recognise (BMGHK).
    result = memory_efficient_attention_forward(
        grouped[None],
        k[None, :, :, None].expand(shape),
        v[None, :, :, None].expand(shape),
        call.bias,
        scale=scale,
    )
    return result[0].flatten(1, 2)
