"""Hamming distances to a whole query group at once (numba).

The distance of a signature to G others depends, bit by bit, on how many of the G have
that bit set. So the G are merged into one *majority* word and, for every margin m of a
majority, a *mask* of the bits decided by it::

    sum_g popcount(s ^ q_g) = sum_m m popcount((s ^ majority) & mask_m) + constant

That is exact, and ceil(G / 2) population counts per word instead of G. The constant is
left out: distances are only compared within one scan.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit
def merged_shape(group, words):
    """Shape of G merged signatures of W words: what `merge` needs."""
    return group + 2, words


@njit
def merge(sources, merged):
    """Merge signatures for `hashevict_vllm.kernels.cpu.scan.hamming_scores`.

    Args:
        sources: int32 [G, W].
        merged: int32, of `merged_shape`, written: the majority, then for m = 0, 1, ..
            the mask of margin G - 2 m.

    """
    group, words = sources.shape
    for w in range(words):
        # Row 1 + m becomes the mask of the bits that m of the signatures have set.
        merged[:, w] = np.int32(0)
        merged[1, w] = np.int32(-1)
        for g in range(group):
            word = sources[g, w]
            for m in range(g + 2, 1, -1):
                merged[m, w] = (merged[m, w] & ~word) | (merged[m - 1, w] & word)
            merged[1, w] &= ~word
        for m in range((group + 1) // 2):
            most = merged[1 + group - m, w]
            merged[0, w] |= most
            merged[1 + m, w] |= most
            merged[1 + group - m, w] = np.int32(0)
