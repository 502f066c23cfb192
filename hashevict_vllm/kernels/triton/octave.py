"""How large a slot's value is, kept in its votes (`policies.value.octaves`)."""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels import codes

OCTAVES = tl.constexpr(codes.OCTAVES)
_LOWEST = tl.constexpr(codes.LOWEST_OCTAVE)


@triton.jit
def octave_of(x):
    """Octave of the squared norm of a value, float32 [D] with 0 beyond it; int32."""
    wide = x.to(tl.float64)
    square = tl.sum(wide * wide, 0).to(tl.float32)
    exponent = (square.to(tl.int32, bitcast=True) >> 23 & 255) - 127
    return tl.minimum(tl.maximum(exponent - _LOWEST, 0), OCTAVES)


@triton.jit
def size_of(word):
    """Squared norm of values, rounded down to octaves: float32 of int32 votes."""
    return ((word & OCTAVES) + (127 + _LOWEST) << 23).to(tl.float32, bitcast=True)


@triton.jit
def votes_of(word):
    """Votes float32 of int32, without octaves."""
    return (word & ~OCTAVES).to(tl.float32, bitcast=True)


@triton.jit
def with_octave(votes, word):
    """Votes float32 as int32, with the octaves that ``word`` int32 holds."""
    return (votes.to(tl.int32, bitcast=True) & ~OCTAVES) | (word & OCTAVES)
