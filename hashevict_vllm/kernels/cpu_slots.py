"""Where a slot lies in the pages, and how its elements are read (numba)."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
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


@intrinsic
def prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of an element, soon to be read and perhaps written.

    Pages of one request lie anywhere, so that a processor cannot foresee the next; a
    miss costs more than the scan of a block.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        i8, i32 = ir.IntType(8), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [i8.as_pointer(), i32, i32, i32])
        function = cgutils.get_or_insert_function(
            builder.module, kind, "llvm.prefetch.p0"
        )
        address = builder.bitcast(builder.gep(data, [args[1]]), i8.as_pointer())
        read, second, data_cache = (ir.Constant(i32, n) for n in (0, 2, 1))
        builder.call(function, [address, read, second, data_cache])
        return context.get_dummy_value()

    return types.void(array, index), codegen


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
    """First tail word of the (block, head) that holds a slot; `row_size` to the next.

    Words lie row by row, those of all heads together (`hashevict_vllm.cache.page`).
    """
    block = np.int64(blocks[slot // geometry[1]])
    return block * geometry[5] + geometry[6] + head * geometry[1]


@inlined
def row_size(geometry):
    """Tail words between one word of a slot and its next: H N."""
    return geometry[0] * geometry[1]


@njit
def prefetch_rows(tail, blocks, first, end, head, geometry, first_row, last_row):
    """Ask for rows [first_row, last_row) of the tail, where slots [first, end) lie.

    ``first`` is a block's first slot.
    """
    block_size, size = geometry[1], row_size(geometry)
    for slot in range(first, end, block_size):
        start = tail_of(blocks, slot, head, geometry)
        for row in range(first_row, last_row):
            for word in range(0, block_size, 16):
                prefetch(tail, start + row * size + word)


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


@njit
def prefetch_slot(elements, blocks, slot, head, slot_map, geometry):
    """Ask for the lines of a slot's K or V; ``slot_map`` int32 [N, D] says which."""
    start = elements_of(blocks, slot, head, geometry)
    at, last = slot_map[slot % geometry[1]], np.int64(-1)
    for d in range(len(at)):
        place = start + at[d]
        # 64 bytes hold 32 elements of two bytes, and 16 of four.
        if place // 32 != last:
            prefetch(elements, place)
            last = place // 32


@njit
def copy_in(elements, tokens, row, blocks, slot, head, k_map, v_map, geometry):
    """Write K and V of a token (`hashevict_vllm.kernels.cpu_tokens`) to a slot."""
    start = elements_of(blocks, slot, head, geometry)
    page = elements[start : start + 2 * geometry[1] * geometry[2]]
    at = row * tokens.k_stride + head * geometry[2]
    key = tokens.k[at : at + geometry[2]]
    at = row * tokens.v_stride + head * geometry[2]
    value = tokens.v[at : at + geometry[2]]
    key_at, value_at = k_map[slot % geometry[1]], v_map[slot % geometry[1]]
    for d in range(len(key)):
        page[key_at[d]] = key[d]
        page[value_at[d]] = value[d]
