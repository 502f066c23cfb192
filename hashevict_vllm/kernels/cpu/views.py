"""Arrays without owners, and prefetches: what numba does not offer (numba)."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic
def unowned(typingctx: Any, array: Any) -> Any:
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
