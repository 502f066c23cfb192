"""Which element of a page holds K[slot, d] and V[slot, d]: asked of the kernel itself.

CPU attention kernels store K transposed, tiled or interleaved, depending on the
instruction set (vLLM csrc/cpu/cpu_attn_*.hpp). Rather than assume an order, a known
pattern is written through the stock cache-update op and read back.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

WriteTokens = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Writes k, v [T, H, D] into a cache [B, H, N, 2D] at flat slots int64 [T]."""

_DIGIT = 128  # Small integers are exact in every float dtype.


def probe_element_map(
    write: WriteTokens, block_size: int, head_dim: int, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Find the order of a (block, head)'s 2 N D elements.

    Args:
        write: The stock cache-update op.
        block_size: N.
        head_dim: D.
        dtype: K/V dtype.

    Returns:
        Two int64 arrays [N, D]: element index of K[slot, d] and of V[slot, d], relative
        to the start of the head's elements.

    Raises:
        RuntimeError: If the op does not place every element exactly once, the same way
            for every head.

    """
    shape = (block_size, 2, head_dim)
    codes = torch.arange(2 * block_size * head_dim).view(2, block_size, head_dim)
    found = torch.zeros(2 * block_size * head_dim, dtype=torch.int64)
    slots = torch.arange(block_size, dtype=torch.int64)
    scale = 1
    while scale < codes.numel():
        digit = (codes // scale % _DIGIT).to(dtype)
        key, value = (x[:, None].expand(shape).contiguous() for x in digit)
        cache = torch.full((1, 2, block_size, 2 * head_dim), -1.0, dtype=dtype)
        write(key, value, cache, slots)
        heads = cache.view(2, -1).to(torch.int64)
        if not torch.equal(heads[0], heads[1]) or bool((heads < 0).any()):
            raise RuntimeError(
                "The stock cache-update op does not fill a page head by head; "
                "HashEvict cannot address its slots."
            )
        found += heads[0] * scale
        scale *= _DIGIT
    element_of = torch.full_like(found, -1)
    element_of[found] = torch.arange(len(found))
    if bool((element_of < 0).any()):
        raise RuntimeError("The stock cache-update op writes some elements twice.")
    k_map, v_map = element_of.view(2, block_size, head_dim).numpy()
    return k_map, v_map
