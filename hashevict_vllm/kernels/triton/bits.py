"""Integer helpers of the kernels: population count and the pseudo-random mix."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run as Python on CPU tensors (``TRITON_INTERPRET=1``)."""

if INTERPRETED:
    # The interpreter has no external functions ("extern_elementwise not supported in
    # interpreter mode"), so it gets the arithmetic that the instruction stands for.
    @triton.jit
    def popcount(x):
        """Set bits of int32 words, as int32."""
        x = x.to(tl.uint32, bitcast=True)
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        x = (x + (x >> 4)) & 0x0F0F0F0F
        x = x + (x >> 8)
        return ((x + (x >> 16)) & 0x3F).to(tl.int32)

else:

    @triton.jit
    def popcount(x):
        """Set bits of int32 words, as int32: one ``popc`` each."""
        return libdevice.popc(x)


@triton.jit
def mix(position, t, SALT: tl.constexpr):
    """Pseudo-random int32 >= 0 of position, step and seed (`policies.random`).

    Args:
        position: int32 [n].
        t: int32, position of the new token.
        SALT: The seed times 0xC2B2AE3D, its low 32 bits.

    """
    h = position.to(tl.uint32, bitcast=True) * 0x9E3779B1
    h = h ^ (t.to(tl.uint32, bitcast=True) * 0x85EBCA77)
    h = h ^ tl.full(position.shape, SALT, tl.uint32)
    h = (h ^ (h >> 15)) * 0x2C1B3C6D
    h = (h ^ (h >> 12)) * 0x297A2D39
    return ((h ^ (h >> 15)) & 0x7FFFFFFF).to(tl.int32)
