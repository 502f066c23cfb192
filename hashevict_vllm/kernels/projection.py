"""The random projection whose signs are the signatures (HashEvict paper, section 3)."""

from __future__ import annotations

import functools

import torch

WORD_BITS = 32
"""Signatures are packed into 32-bit words, least significant bit first."""


def num_words(hash_bits: int) -> int:
    """Number of 32-bit words of one packed signature."""
    return -(-hash_bits // WORD_BITS)


@functools.lru_cache(maxsize=8)
def make_projection(
    head_dim: int, hash_bits: int, seed: int, orthogonal: bool
) -> torch.Tensor:
    """The projection R, equal in every process and on every tensor-parallel rank.

    Args:
        head_dim: D.
        hash_bits: b; 0 for a rule that hashes nothing.
        seed: Seed of the generator.
        orthogonal: Columns are orthogonalised in blocks of at most D, which lowers the
            variance of the angle estimate (super-bit LSH).

    Returns:
        float32 [D, b] on the CPU. Drawn in float64 with an explicit device, as model
        code may run under another default dtype or device.

    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    columns = [torch.empty(head_dim, 0, dtype=torch.float64, device="cpu")]
    remaining = hash_bits
    while remaining:
        gaussian = torch.randn(
            head_dim, head_dim, generator=generator, dtype=torch.float64, device="cpu"
        )
        block = torch.linalg.qr(gaussian)[0] if orthogonal else gaussian
        width = min(remaining, head_dim)
        columns.append(block[:, :width])
        remaining -= width
    return torch.cat(columns, dim=1).to(torch.float32).contiguous()
