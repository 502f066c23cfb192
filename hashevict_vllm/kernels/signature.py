"""Signatures in plain torch: sign bits of a projection, and their packed form."""

from __future__ import annotations

import torch

from hashevict_vllm.kernels.projection import WORD_BITS, num_words


def signature_bits(x: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Sign bits ``x . r_j >= 0`` (HashEvict paper, section 3).

    Args:
        x: [..., D], any float dtype.
        projection: float32 [D, b].

    Returns:
        bool [..., b].

    """
    return x.to(torch.float32) @ projection >= 0


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Pack bool [..., b] into int32 words [..., ceil(b / 32)], low bit first."""
    b = bits.shape[-1]
    padded = torch.zeros(*bits.shape[:-1], num_words(b) * WORD_BITS, dtype=torch.int64)
    padded[..., :b] = bits.to(torch.int64)
    weights = 2 ** torch.arange(WORD_BITS, dtype=torch.int64)
    words = (padded.unflatten(-1, (-1, WORD_BITS)) * weights).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
