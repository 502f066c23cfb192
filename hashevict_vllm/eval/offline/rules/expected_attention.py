"""Expected Attention (kvpress; Devoto et al., arXiv 2510.00636)."""

from __future__ import annotations

import torch
from torch.nn import functional

from hashevict_vllm.eval.offline.model import PromptLayer
from hashevict_vllm.eval.offline.rules.base import PromptOnly

FUTURE = 512
SINKS = 4


class ExpectedAttention(PromptOnly):
    """Attention that future queries are expected to pay, times the value's norm.

    Queries before RoPE are taken as Gaussian, rotated by the mean rotation of the next
    `FUTURE` positions; E[exp(q k)] follows from mean and covariance. As in kvpress
    0.5.5 with its defaults.
    """

    label = "Expected Attention (offline)"

    def score(self, prompt: PromptLayer) -> torch.Tensor:
        """See `PromptOnly.score`."""
        n, dim = prompt.k.shape[1:]
        queries = prompt.plain_queries()[:, :, SINKS:]
        mean = queries.mean(2)
        centred = queries - mean[:, :, None]
        covariance = centred.transpose(2, 3) @ centred / centred.shape[2]
        turn = self._mean_rotation(prompt, n, dim)
        mean, covariance = mean @ turn.T, turn @ covariance @ turn.T
        k, v = prompt.k[:, None, SINKS:], prompt.v[:, SINKS:]
        logits = (k @ mean[..., None])[..., 0] * prompt.scale
        logits += ((k @ covariance) * k).sum(-1) * prompt.scale**2 / 2
        expected = logits.softmax(-1).mean(1) * v.norm(dim=-1)
        return functional.pad(expected, (SINKS, 0), value=expected.max().item() + 1)

    @staticmethod
    def _mean_rotation(prompt: PromptLayer, n: int, dim: int) -> torch.Tensor:
        """RoPE as a matrix [D, D], averaged over the positions after the prompt."""
        cos, sin = (x.mean(0) for x in prompt.rotation(torch.arange(n, n + FUTURE)))
        half = dim // 2
        quarter = torch.zeros(dim, dim)
        quarter[half:, :half] = torch.eye(half)
        quarter[:half, half:] = -torch.eye(half)
        return cos[:, None] * torch.eye(dim) + sin[:, None] * quarter
