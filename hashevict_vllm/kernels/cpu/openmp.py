"""Runs a kernel's items on the OpenMP threads that attention runs on.

Threads of another pool would fight with those for the cores: OpenMP threads spin for a
while when they have nothing to do, and steps 20 times slower were seen. So the kernel
calls the OpenMP library that torch has loaded, as compiled C code would: GOMP_parallel
of libgomp, which libomp and libiomp5 have too.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def find_openmp() -> np.ndarray:
    """This process's OpenMP threads: address of GOMP_parallel, and their number.

    Returns:
        int64 [2]; one thread where no OpenMP library is loaded for all to see.

    """
    try:
        loaded = ctypes.CDLL(None)
        start = ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value
        threads = loaded.omp_get_max_threads()
    except (AttributeError, OSError):  # not exported; no handle of this process
        start, threads = 0, 1
    return np.array([start or 0, threads], np.int64)


@intrinsic
def share_items(
    typingctx: Any, run: Any, arguments: Any, items: Any, start: Any, threads: Any
) -> Any:
    """``run(*arguments, first, last)`` on threads, until all items are done.

    An exception ends the part of the items in which it was raised, not the other parts.

    Every thread claims a part of [0, items) by counting up, until none is left: should
    OpenMP start fewer threads than were asked for, the others do more.

    ``run`` is compiled; ``arguments`` a tuple of unowned arrays and numbers; ``start``
    the address of GOMP_parallel; ``threads`` at least 1.

    Returns:
        bool, whether all items were done. The caller raises if not: an exception cannot
        leave OpenMP's threads.

    """
    int64 = types.int64
    signature = typingctx.resolve_function_type(
        run, (*arguments.types, int64, int64), {}
    )

    def codegen(context: Any, builder: Any, outer: Any, values: Any) -> Any:
        _, arguments, items, start, threads = values
        i64, i32, i8 = ir.IntType(64), ir.IntType(32), ir.IntType(8)
        packed = outer.args[1]
        compiled = run.dispatcher.get_compile_result(signature)
        context.active_code_library.add_linking_library(compiled.library)
        function = context.declare_function(builder.module, compiled.fndesc)

        # What threads see: the next part, the number of parts, of items, the arguments,
        # and the number of parts that failed.
        kinds = [i64, i64, i64, context.get_value_type(packed), i64]
        shared_type = ir.LiteralStructType(kinds)
        shared = cgutils.alloca_once(builder, shared_type)
        none = ir.Constant(i64, 0)
        for field, value in enumerate((none, threads, items, arguments, none)):
            builder.store(value, cgutils.gep_inbounds(builder, shared, 0, field))

        task_type = ir.FunctionType(ir.VoidType(), [i8.as_pointer()])
        name = builder.module.get_unique_name(f"{compiled.fndesc.unique_name}_task")
        task = ir.Function(builder.module, task_type, name)
        task.linkage = "internal"
        inner = ir.IRBuilder(task.append_basic_block("entry"))
        mine = inner.bitcast(task.args[0], shared_type.as_pointer())
        next_part = cgutils.gep_inbounds(inner, mine, 0, 0)
        failed = cgutils.gep_inbounds(inner, mine, 0, 4)
        parts, total, given = (
            inner.load(cgutils.gep_inbounds(inner, mine, 0, field))
            for field in (1, 2, 3)
        )
        claim, work, done = (
            task.append_basic_block(block) for block in ("claim", "work", "done")
        )
        inner.branch(claim)
        inner.position_at_end(claim)
        part = inner.atomic_rmw("add", next_part, ir.Constant(i64, 1), "monotonic")
        inner.cbranch(inner.icmp_signed("<", part, parts), work, done)
        inner.position_at_end(work)
        first, last = (
            inner.sdiv(inner.mul(number, total), parts)
            for number in (part, inner.add(part, ir.Constant(i64, 1)))
        )
        unpacked = [inner.extract_value(given, i) for i in range(len(packed.types))]
        status, _ = context.call_conv.call_function(
            inner,
            function,
            signature.return_type,
            signature.args,
            [*unpacked, first, last],
        )
        failure = inner.zext(status.is_error, i64)
        inner.atomic_rmw("add", failed, failure, "monotonic")
        inner.branch(claim)
        inner.position_at_end(done)
        inner.ret_void()

        data = builder.bitcast(shared, i8.as_pointer())
        alone = builder.icmp_signed("<=", threads, ir.Constant(threads.type, 1))
        with builder.if_else(alone) as (then, otherwise):
            with then:
                builder.call(task, [data])
            with otherwise:
                parallel_type = ir.FunctionType(
                    ir.VoidType(), [task_type.as_pointer(), i8.as_pointer(), i32, i32]
                )
                parallel = builder.inttoptr(start, parallel_type.as_pointer())
                count = builder.trunc(threads, i32)
                builder.call(parallel, [task, data, count, ir.Constant(i32, 0)])
        failures = builder.load(cgutils.gep_inbounds(builder, shared, 0, 4))
        return builder.icmp_signed("==", failures, none)

    return types.boolean(run, arguments, int64, int64, int64), codegen
