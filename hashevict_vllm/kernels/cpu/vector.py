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

LANES = 16
"""Keys that `sum_of_run` reads at once; divides every block size."""


def data_of(context: Any, builder: Any, signature: Any, args: Any, which: int) -> Any:
    """Pointer to the first element of an array argument."""
    array = context.make_array(signature.args[which])(context, builder, args[which])
    return array.data


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
