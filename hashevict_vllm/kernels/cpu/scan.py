"""The scan over a request's slots, in LLVM's vector types (numba).

Loops without a branch per block: scores into scratch, their largest, and, if that is
not below the best so far, the best slot of every vector lane. Only the last one reads
positions, so that most blocks' stay where they are. What LLVM made of the same loops in
numba took four times as long per slot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from hashevict_vllm.kernels.cpu.vector import data_of, splat

_INT = ir.IntType(32)

SCAN_LANES = 32
"""Slots whose distances are computed at once; divides every block size."""
BEST_LANES = 16
"""Lanes that keep a best slot each."""
TOP = 3 * BEST_LANES
"""Where `keep_best` keeps the largest of the lanes' scores."""
BEST_SIZE = TOP + 1
"""int32 numbers that `keep_best` keeps: scores, positions, slots, and `TOP`."""

_INT32_MAX = 2**31 - 1


@intrinsic
def hamming_scores(
    typingctx: Any,
    tail: Any,
    base: Any,
    stride: Any,
    words: Any,
    merged: Any,
    which: Any,
    masks: Any,
    odd: Any,
    score: Any,
    count: Any,
) -> Any:
    """Distances of a block's slots to merged signatures (`hamming.merge`).

    With S_m the differing bits under the first m masks, the margins G, G - 2, .. make
    the distance 2 S_1 + 2 S_2 + .. + (1 or 2) S_M: no multiplication.

    ``tail`` int32 [..]: word w of slot i at ``base + w stride + i``; ``merged`` int32
    [H, 1 + M.., W], of number ``which`` the majority and the masks; ``masks`` M;
    ``odd`` 1 if G is odd; ``score`` int32 [>= count], written up to a multiple of
    `SCAN_LANES`. No slices: numba counts references of those.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, base, stride, words, _, which, masks, odd, _, count = args
        tail = data_of(context, builder, signature, args, 0)
        score = data_of(context, builder, signature, args, 8)
        array = context.make_array(signature.args[4])(context, builder, args[4])
        height, row_size = (builder.extract_value(array.shape, i) for i in (1, 2))
        start = builder.mul(which, builder.mul(height, row_size))
        merged = builder.gep(array.data, [start])
        vector, index = ir.VectorType(_INT, SCAN_LANES), base.type
        one = ir.Constant(index, 1)

        def at(data: Any, offset: Any) -> Any:
            return builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())

        def constant(row: Any, word: Any) -> Any:
            place = builder.add(builder.mul(row, row_size), word)
            value = builder.load(builder.gep(merged, [place]))
            return splat(builder, value, SCAN_LANES)

        count_bits = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(vector, [vector]),
            f"llvm.ctpop.v{SCAN_LANES}i32",
        )
        zeros = ir.Constant(vector, [0] * SCAN_LANES)
        with cgutils.for_range_slice(
            builder, ir.Constant(index, 0), count, ir.Constant(index, SCAN_LANES)
        ) as (i, _unused):
            total = cgutils.alloca_once_value(builder, zeros)
            differing = cgutils.alloca_once_value(builder, zeros)
            with cgutils.for_range(builder, masks) as by_mask:
                row = builder.add(by_mask.index, one)
                with cgutils.for_range(builder, words) as by_word:
                    w = by_word.index
                    place = builder.add(base, builder.add(builder.mul(w, stride), i))
                    x = builder.load(at(tail, place), align=4)
                    x = builder.xor(x, constant(ir.Constant(index, 0), w))
                    x = builder.and_(x, constant(row, w))
                    bits = builder.call(count_bits, [x])
                    builder.store(builder.add(builder.load(differing), bits), differing)
                last = builder.icmp_signed("==", row, masks)
                halved = builder.and_(last, builder.trunc(odd, ir.IntType(1)))
                shift = builder.select(
                    halved, ir.Constant(_INT, 0), ir.Constant(_INT, 1)
                )
                weighed = builder.shl(
                    builder.load(differing), splat(builder, shift, SCAN_LANES)
                )
                builder.store(builder.add(builder.load(total), weighed), total)
            builder.store(builder.load(total), at(score, i), align=4)
        return context.get_dummy_value()

    return (
        types.void(tail, base, stride, words, merged, which, masks, odd, score, count),
        codegen,
    )


@intrinsic
def largest_score(typingctx: Any, score: Any, count: Any) -> Any:
    """The largest of a block's scores, an int32.

    ``score`` int32 [>= count], read up to a multiple of `SCAN_LANES`.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        score = data_of(context, builder, signature, args, 0)
        vector, index = ir.VectorType(_INT, SCAN_LANES), args[1].type
        name = f"v{SCAN_LANES}i32"
        larger = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(vector, [vector, vector]),
            f"llvm.smax.{name}",
        )
        most = cgutils.alloca_once_value(
            builder, ir.Constant(vector, [-(2**31)] * SCAN_LANES)
        )
        with cgutils.for_range_slice(
            builder, ir.Constant(index, 0), args[1], ir.Constant(index, SCAN_LANES)
        ) as (i, _unused):
            place = builder.bitcast(builder.gep(score, [i]), vector.as_pointer())
            scores = builder.load(place, align=4)
            builder.store(builder.call(larger, [builder.load(most), scores]), most)
        return _largest_lane(builder, builder.load(most))

    return types.int32(score, count), codegen


def _largest_lane(builder: Any, vector: Any) -> Any:
    """The largest number of an LLVM vector of int32."""
    reduce = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(_INT, [vector.type]),
        f"llvm.vector.reduce.smax.v{vector.type.count}i32",
    )
    return builder.call(reduce, [vector])


@intrinsic
def keep_best(
    typingctx: Any,
    score: Any,
    tail: Any,
    start: Any,
    count: Any,
    first_slot: Any,
    lowest: Any,
    highest: Any,
    best: Any,
    which: Any,
) -> Any:
    """Let every lane keep its best slot: largest score, then oldest position.

    ``score`` int32 [>= count]; ``tail`` int32 [..], positions from ``start`` on, of
    which those outside [``lowest``, ``highest``] are protected or dead; ``first_slot``
    the number of the first; ``best`` int32 [H, BEST_SIZE], of which row ``which`` holds
    scores, positions and slots, and the largest score of all.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, start, count, first_slot, lowest, highest, _, which = args
        score, tail = (
            data_of(context, builder, signature, args, which) for which in (0, 1)
        )
        best = data_of(context, builder, signature, args, 7)
        row = builder.mul(which, ir.Constant(which.type, BEST_SIZE))
        best = builder.gep(best, [row])
        vector, index = ir.VectorType(_INT, BEST_LANES), start.type
        lanes = ir.Constant(vector, list(range(BEST_LANES)))

        def at(data: Any, offset: Any) -> Any:
            return builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())

        def wide(value: Any) -> Any:
            return splat(builder, builder.trunc(value, _INT), BEST_LANES)

        places = [
            at(best, ir.Constant(index, which * BEST_LANES)) for which in range(3)
        ]
        kept = [
            cgutils.alloca_once_value(builder, builder.load(place, align=4))
            for place in places
        ]
        limit, low, high = wide(count), wide(lowest), wide(highest)
        slots = wide(first_slot)
        with cgutils.for_range_slice(
            builder, ir.Constant(index, 0), count, ir.Constant(index, BEST_LANES)
        ) as (i, _unused):
            here = builder.add(wide(i), lanes)
            scores = builder.load(at(score, i), align=4)
            positions = builder.load(at(tail, builder.add(start, i)), align=4)
            best_score, best_position, best_slot = map(builder.load, kept)
            allowed = builder.and_(
                builder.icmp_signed("<", here, limit),
                builder.and_(
                    builder.icmp_signed(">=", positions, low),
                    builder.icmp_signed("<=", positions, high),
                ),
            )
            better = builder.or_(
                builder.icmp_signed(">", scores, best_score),
                builder.and_(
                    builder.icmp_signed("==", scores, best_score),
                    builder.icmp_signed("<", positions, best_position),
                ),
            )
            taken = builder.and_(allowed, better)
            found = (scores, positions, builder.add(slots, here))
            before = (best_score, best_position, best_slot)
            for new, old, pointer in zip(found, before, kept, strict=True):
                builder.store(builder.select(taken, new, old), pointer)
        for place, pointer in zip(places, kept, strict=True):
            builder.store(builder.load(pointer), place, align=4)
        top = _largest_lane(builder, builder.load(kept[0]))
        builder.store(top, builder.gep(best, [ir.Constant(index, TOP)]))
        return context.get_dummy_value()

    return (
        types.void(score, tail, start, count, first_slot, lowest, highest, best, which),
        codegen,
    )


@njit
def reset_best(best):
    """No slot yet, for `keep_best`."""
    best[:] = np.int32(-1)
    best[BEST_LANES : 2 * BEST_LANES] = np.int32(_INT32_MAX)


@njit
def best_slot(best):
    """The best of all lanes, as an int64; -1 if every slot is protected."""
    lane = 0
    for other in range(1, BEST_LANES):
        score, top = best[other], best[lane]
        older = best[BEST_LANES + other] < best[BEST_LANES + lane]
        if score > top or (score == top and older):
            lane = other
    return np.int64(best[2 * BEST_LANES + lane])
