"""Hamming distances to a whole query group at once (numba).

The distance of a signature to G others depends, bit by bit, on how many of the G have
that bit set. So the G are merged into one *majority* word and, for every margin m of a
majority, a *mask* of the bits decided by it::

    sum_g popcount(s ^ q_g) = sum_m m popcount((s ^ majority) & mask_m) + constant

That is exact, and ceil(G / 2) population counts per word instead of G. The constant is
left out: distances are only compared within one scan.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic


@intrinsic
def popcount(typingctx: Any, value: Any) -> Any:
    """Population count of an int32, as LLVM's ctpop, which vectorises to vpopcntd."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(builder.trunc(args[0], ir.IntType(32)))

    return types.int32(types.int32), codegen


@njit
def merged_shape(group, words):
    """Shape of G merged signatures of W words; words come in pairs."""
    return group + 2, (words + 1) // 2 * 2


@njit
def merge(sources, merged):
    """Merge signatures for `add_distances`.

    Args:
        sources: int32 [G, W].
        merged: int32, of `merged_shape`, zeros in its padding: the majority, then for
            m = 0, 1, .. the mask of margin G - 2 m.

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


@njit
def add_distances(tail, base, block_size, words, merged, group, score):
    """Add the distances of a block's first slots to ``score`` int32 [n].

    ``base`` is the first tail word of the (block, head), ``merged`` as in `merge`.
    """
    count = len(score)
    for w in range(0, words, 2):
        # An odd last word is paired with itself under a mask of zeros.
        start = base + w * block_size
        row = tail[start : start + count]
        start = base + min(w + 1, words - 1) * block_size
        next_row = tail[start : start + count]
        flip, next_flip = merged[0, w], merged[0, w + 1]
        for m in range(1, (group + 1) // 2 + 1, 2):
            a, next_a = merged[m, w], merged[m, w + 1]
            b, next_b = merged[m + 1, w], merged[m + 1, w + 1]
            margin = np.int32(group - 2 * m + 2)
            below = margin - np.int32(2)
            for i in range(count):
                x, y = row[i] ^ flip, next_row[i] ^ next_flip
                score[i] += margin * (popcount(x & a) + popcount(y & next_a))
                score[i] += below * (popcount(x & b) + popcount(y & next_b))
