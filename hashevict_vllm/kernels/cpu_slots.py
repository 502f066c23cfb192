"""Where a slot lies in the pages, and how its elements are read (numba)."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from hashevict_vllm.kernels.codes import BFLOAT16, FLOAT16
from hashevict_vllm.kernels.jit import inlined

FP16_REBIAS = np.float32(2.0**112)
"""Factor on a float16's bits, read as those of a float32."""


@intrinsic
def borrowed(typingctx: Any, array: Any) -> Any:
    """The same array without an owner, for the time of a kernel call.

    numba counts references of every slice of an owned array, atomically: in the scan of
    a block that takes longer than the block's slots do.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        view = context.make_array(array)(context, builder, args[0])
        view.meminfo = ir.Constant(view.meminfo.type, None)
        view.parent = ir.Constant(view.parent.type, None)
        return view._getvalue()

    return array(array), codegen


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
            out[d] *= FP16_REBIAS
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
