"""Inner loops in LLVM's vector types, where LLVM makes none of numba's own code.

Vectors are of fixed size and no processor's own: LLVM splits or widens them as needed.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_FOUR = ir.VectorType(_FLOAT, 4)

LANES = 16
"""Keys that `sum_of_run` reads at once; divides every block size."""


def data_of(context: Any, builder: Any, signature: Any, args: Any, which: int) -> Any:
    """Pointer to the first element of an array argument."""
    array = context.make_array(signature.args[which])(context, builder, args[which])
    return array.data


def _four_at(builder: Any, data: Any, index: Any) -> Any:
    """Pointer to four floats from an index on."""
    return builder.bitcast(builder.gep(data, [index]), _FOUR.as_pointer())


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """A vector of equal elements."""
    vector = ir.VectorType(value.type, lanes)
    zeros = ir.Constant(ir.VectorType(_INT, lanes), [0] * lanes)
    one = builder.insert_element(
        ir.Constant(vector, ir.Undefined), value, ir.Constant(_INT, 0)
    )
    return builder.shuffle_vector(one, one, zeros)


@intrinsic
def sum_of_run(
    typingctx: Any, page: Any, at: Any, lanes: Any, sign: Any, rest: Any, shift: Any
) -> Any:
    """Sum of 16 consecutive elements as float32, those in masked lanes only.

    ``page`` unsigned [..], raw; ``lanes`` uint32 [16], all bits set or none. An
    element's bits in ``sign`` move up by 16, those in ``rest`` by ``shift``.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = context.get_data_type(signature.args[0].dtype)
        raws, masks = ir.VectorType(element, LANES), ir.VectorType(_INT, LANES)
        place = builder.gep(data_of(context, builder, signature, args, 0), [args[1]])
        raw = builder.load(
            builder.bitcast(place, raws.as_pointer()), align=element.width // 8
        )
        if element.width < 32:
            raw = builder.zext(raw, masks)
        chosen = data_of(context, builder, signature, args, 2)
        mask = builder.load(builder.bitcast(chosen, masks.as_pointer()), align=4)
        sign, rest, shift = (splat(builder, value, LANES) for value in args[3:])
        sixteen = ir.Constant(masks, [16] * LANES)
        moved = builder.or_(
            builder.shl(builder.and_(raw, sign), sixteen),
            builder.shl(builder.and_(raw, rest), shift),
        )
        floats = builder.bitcast(
            builder.and_(moved, mask), ir.VectorType(_FLOAT, LANES)
        )
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_FLOAT, [_FLOAT, floats.type]),
            f"llvm.vector.reduce.fadd.v{LANES}f32",
        )
        zero = ir.Constant(_FLOAT, 0.0)
        return builder.call(function, [zero, floats], fastmath=("reassoc",))

    return types.float32(page, at, lanes, sign, rest, shift), codegen


@intrinsic
def double_table(typingctx: Any, table: Any, size: Any, steps: Any) -> Any:
    """Double a table of rows of four floats: each less ``steps``, then each plus it.

    ``table`` float32 [..], of which ``size`` elements are there; ``steps`` float32 [4].
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        table = data_of(context, builder, signature, args, 0)
        steps = data_of(context, builder, signature, args, 2)
        index = args[1].type
        four, zero = ir.Constant(index, 4), ir.Constant(index, 0)
        step = builder.load(_four_at(builder, steps, zero), align=4)
        with cgutils.for_range(builder, builder.sdiv(args[1], four)) as loop:
            i = builder.mul(loop.index, four)
            low = _four_at(builder, table, i)
            high = _four_at(builder, table, builder.add(i, args[1]))
            row = builder.load(low, align=4)
            builder.store(builder.fadd(row, step), high, align=4)
            builder.store(builder.fsub(row, step), low, align=4)
        return context.get_dummy_value()

    return types.void(table, size, steps), codegen


@intrinsic
def add_rows(typingctx: Any, words: Any, tables: Any, sums: Any) -> Any:
    """Add, for every word, the table rows that its four bytes name.

    ``words`` int32 [n]; ``tables`` float32 [4 * 256 * 4], a table of 256 rows of four
    for each byte; ``sums`` float32 [n * 4].
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words, tables, sums = (
            data_of(context, builder, signature, args, which) for which in range(3)
        )
        array = context.make_array(signature.args[0])(context, builder, args[0])
        index = array.nitems.type
        with cgutils.for_range(builder, array.nitems) as loop:
            word = builder.load(builder.gep(words, [loop.index]))
            target = _four_at(
                builder, sums, builder.mul(loop.index, ir.Constant(index, 4))
            )
            rows = []
            for byte in range(4):
                value = builder.lshr(word, ir.Constant(_INT, 8 * byte))
                value = builder.and_(value, ir.Constant(_INT, 255))
                row = builder.shl(builder.zext(value, index), ir.Constant(index, 2))
                row = builder.add(row, ir.Constant(index, 1024 * byte))
                place = _four_at(builder, tables, row)
                rows.append(builder.load(place, align=4))
            total = builder.fadd(
                builder.fadd(rows[0], rows[1]), builder.fadd(rows[2], rows[3])
            )
            total = builder.fadd(builder.load(target, align=4), total)
            builder.store(total, target, align=4)
        return context.get_dummy_value()

    return types.void(words, tables, sums), codegen
