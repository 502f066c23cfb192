"""Where a slot lies in the pages, and how its elements are read (numba)."""

from __future__ import annotations

import numpy as np

from hashevict_vllm.kernels.codes import BFLOAT16, FLOAT16
from hashevict_vllm.kernels.jit import inlined

_FP16_REBIAS = np.float32(2.0**112)


@inlined
def load(raw, kind, out):
    """Read one row of D raw elements as float32 into ``out`` [D]."""
    bits = out.view(np.uint32)
    if kind == BFLOAT16:
        for d in range(len(raw)):
            bits[d] = np.uint32(raw[d]) << np.uint32(16)
    elif kind == FLOAT16:
        for d in range(len(raw)):
            x = np.uint32(raw[d])
            sign = (x & np.uint32(0x8000)) << np.uint32(16)
            bits[d] = sign | ((x & np.uint32(0x7FFF)) << np.uint32(13))
        for d in range(len(raw)):
            out[d] *= _FP16_REBIAS
    else:
        for d in range(len(raw)):
            bits[d] = np.uint32(raw[d])


@inlined
def tail_of(blocks, slot, head, geometry):
    """First tail word of the (block, head) that holds a slot."""
    block = np.int64(blocks[slot // geometry[1]])
    rows = (geometry[3] + 1) * geometry[1]
    return block * geometry[5] + geometry[6] + head * rows


@inlined
def elements_of(blocks, slot, head, geometry):
    """First K/V element of the (block, head) that holds a slot."""
    block = np.int64(blocks[slot // geometry[1]])
    return block * geometry[4] + head * 2 * geometry[1] * geometry[2]


@inlined
def load_key(elements, blocks, slot, head, k_map, geometry, out):
    """Read the key of a slot as float32 into ``out`` [D]."""
    start = elements_of(blocks, slot, head, geometry)
    page = elements[start : start + geometry[1] * geometry[2] * 2]
    at = k_map[slot % geometry[1]]
    raw = np.empty(len(out), elements.dtype)
    for d in range(len(out)):
        raw[d] = page[at[d]]
    load(raw, geometry[7], out)
