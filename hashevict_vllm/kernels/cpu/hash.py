"""Projections and signatures (numba, with vector code where LLVM finds none itself).

A projection is a product of a few rows with R. Its sums stay in registers here: LLVM
keeps numba's arrays in memory, which takes three times as long. Vectors of eight are
written in LLVM's own types, for which every processor has instructions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_FLOAT, _INDEX = ir.FloatType(), ir.IntType(32)
_LANES = 8


def _make_tile(rows: int, width: int) -> Any:
    """An intrinsic for ``rows`` rows and ``width`` columns of x R."""
    lanes = min(width, _LANES)
    vector = ir.VectorType(_FLOAT, lanes)

    @intrinsic
    def tile(
        typingctx: Any,
        x: Any,
        projection: Any,
        dots: Any,
        b: Any,
        row: Any,
        column: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            arrays = [
                context.make_array(kind)(context, builder, value)
                for kind, value in zip(signature.args[:3], args[:3], strict=True)
            ]
            x, projection, dots = (array.data for array in arrays)
            b, row, column = args[3:]
            dim = builder.sdiv(arrays[1].nitems, b)

            def at(pointer: Any, index: Any) -> Any:
                return builder.bitcast(
                    builder.gep(pointer, [index]), vector.as_pointer()
                )

            def plus(value: Any, number: int) -> Any:
                return builder.add(value, ir.Constant(value.type, number))

            sums = [
                [cgutils.alloca_once(builder, vector) for _ in range(0, width, lanes)]
                for _ in range(rows)
            ]
            for pointer in [pointer for line in sums for pointer in line]:
                builder.store(ir.Constant(vector, [0.0] * lanes), pointer)
            starts = [builder.mul(plus(row, r), dim) for r in range(rows)]
            everywhere = ir.Constant(ir.VectorType(_INDEX, lanes), [0] * lanes)
            with cgutils.for_range(builder, dim) as loop:
                first = builder.add(builder.mul(loop.index, b), column)
                columns = [
                    builder.load(at(projection, plus(first, c)), align=4)
                    for c in range(0, width, lanes)
                ]
                for start, line in zip(starts, sums, strict=True):
                    place = builder.gep(x, [builder.add(start, loop.index)])
                    one = builder.insert_element(
                        ir.Constant(vector, ir.Undefined),
                        builder.load(place),
                        ir.Constant(_INDEX, 0),
                    )
                    value = builder.shuffle_vector(one, one, everywhere)
                    for pointer, factors in zip(line, columns, strict=True):
                        product = builder.fmul(value, factors, flags=("contract",))
                        total = builder.fadd(
                            builder.load(pointer), product, flags=("contract",)
                        )
                        builder.store(total, pointer)
            for r, line in enumerate(sums):
                first = builder.add(builder.mul(plus(row, r), b), column)
                for c, pointer in enumerate(line):
                    target = at(dots, plus(first, c * lanes))
                    builder.store(builder.load(pointer), target, align=4)
            return context.get_dummy_value()

        return types.void(x, projection, dots, b, row, column), codegen

    return tile


# Eight sums at a time hide the latency of an addition.
_four_by_16, _four_by_4 = _make_tile(4, 16), _make_tile(4, 4)
_one_by_64, _one_by_16, _one_by_4 = (
    _make_tile(1, 64),
    _make_tile(1, 16),
    _make_tile(1, 4),
)


@intrinsic
def _signs_of_32(typingctx: Any, dots: Any, first: Any) -> Any:
    """Bits ``dots[first + j] >= 0`` of 32 floats, as an int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(_FLOAT, 32)
        array = context.make_array(signature.args[0])(context, builder, args[0])
        place = builder.gep(array.data, [args[1]])
        floats = builder.load(builder.bitcast(place, vector.as_pointer()), align=4)
        zeros = ir.Constant(vector, [0.0] * 32)
        return builder.bitcast(builder.fcmp_ordered(">=", floats, zeros), _INDEX)

    return types.int32(dots, first), codegen


@njit
def project_rows(x, projection, dots, rows):
    """``x . r_j`` of some rows for all j.

    Args:
        x: float32 [rows * D], flat.
        projection: float32 [D * b], R row-major.
        dots: float32 [rows * b], written.
        rows: Number of rows.

    """
    b = np.int64(len(dots) // rows)
    row = np.int64(0)
    while row < rows:
        column = np.int64(0)
        if rows - row >= 4:
            while b - column >= 16:
                _four_by_16(x, projection, dots, b, row, column)
                column += 16
            while column < b:  # b is a multiple of 4
                _four_by_4(x, projection, dots, b, row, column)
                column += 4
            row += 4
        else:
            while b - column >= 64:
                _one_by_64(x, projection, dots, b, row, column)
                column += 64
            while b - column >= 16:
                _one_by_16(x, projection, dots, b, row, column)
                column += 16
            while column < b:
                _one_by_4(x, projection, dots, b, row, column)
                column += 4
            row += 1


@njit
def pack_signs(dots, words):
    """Pack ``dots[j] >= 0`` of float32 [b] into int32 [W], low bit first."""
    for w in range(len(words)):
        if len(dots) >= w * 32 + 32:
            words[w] = _signs_of_32(dots, np.int64(w * 32))
        else:
            word = np.uint32(0)
            chunk = dots[w * 32 :]
            for j in range(len(chunk)):
                word |= np.uint32(chunk[j] >= 0) << np.uint32(j)
            words[w] = np.int32(word)


@njit
def hash_row(x, projection, dots, words):
    """Signature of x [D]: bit j is ``x . r_j >= 0``, packed into ``words`` [W].

    ``dots`` [b] is scratch.
    """
    project_rows(x, projection, dots, 1)
    pack_signs(dots, words)
