"""Inner loops of a ballot, in LLVM's vector types (numba).

Four queries vote at once; what belongs to them lies side by side: [n, 4].
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hashevict_vllm.kernels.cpu.vector import data_of, splat

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)

WIDTH = 16
"""Floats of a vector: four queries' of four slots, or one of sixteen."""


def _floats(builder: Any, data: Any, index: Any, lanes: int = 4) -> Any:
    """Pointer to a vector of floats from an index on."""
    vector = ir.VectorType(_FLOAT, lanes)
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _mask(lanes: list[int]) -> Any:
    """The lanes that a shuffle takes."""
    return ir.Constant(ir.VectorType(_INT, len(lanes)), lanes)


def _constant(value: float, lanes: int = WIDTH) -> Any:
    return ir.Constant(ir.VectorType(_FLOAT, lanes), [value] * lanes)


def _by_name(builder: Any, name: str, *values: Any) -> Any:
    """Call an LLVM function of vectors such as ``floor``."""
    kind = values[0].type
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(kind, [kind] * len(values)),
        f"llvm.{name}.v{kind.count}f32",
    )
    return builder.call(function, values)


def _steps(builder: Any, end: Any, step: int) -> Any:
    """``for i in range(0, end, step)``."""
    zero, size = ir.Constant(end.type, 0), ir.Constant(end.type, step)
    return cgutils.for_range_slice(builder, zero, end, size)


def _exp(builder: Any, x: Any) -> Any:
    """exp(x) for x <= 0 within 3e-7: 2^n times a polynomial of the rest."""
    fast = ("contract",)
    y = builder.fmul(x, _constant(1.4426950408889634))
    y = _by_name(builder, "maxnum", y, _constant(-126.0))
    n = _by_name(builder, "floor", builder.fadd(y, _constant(0.5)))
    r = builder.fmul(builder.fsub(y, n), _constant(0.6931471805599453))
    p = _constant(1 / 5040)
    for factor in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = builder.fadd(builder.fmul(p, r, flags=fast), _constant(factor), flags=fast)
    whole = ir.VectorType(_INT, WIDTH)
    exponent = builder.add(builder.fptosi(n, whole), ir.Constant(whole, [127] * WIDTH))
    scale = builder.shl(exponent, ir.Constant(whole, [23] * WIDTH))
    return builder.fmul(p, builder.bitcast(scale, ir.VectorType(_FLOAT, WIDTH)))


@intrinsic
def double_table(typingctx: Any, table: Any, at: Any, size: Any, steps: Any) -> Any:
    """Double a table of rows of four floats: each less ``steps``, then each plus it.

    ``table`` float32 [..], from element ``at`` on, of which ``size`` are there, a power
    of two; ``steps`` float32 [4].
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        table = data_of(context, builder, signature, args, 0)
        steps = data_of(context, builder, signature, args, 3)
        table, size = builder.gep(table, [args[1]]), args[2]
        step = builder.load(_floats(builder, steps, ir.Constant(size.type, 0)), align=4)

        def double(lanes: int) -> None:
            wide = builder.shuffle_vector(
                step, step, _mask([i % 4 for i in range(lanes)])
            )
            with _steps(builder, size, lanes) as (i, _unused):
                low = _floats(builder, table, i, lanes)
                high = _floats(builder, table, builder.add(i, size), lanes)
                row = builder.load(low, align=4)
                builder.store(builder.fadd(row, wide), high, align=4)
                builder.store(builder.fsub(row, wide), low, align=4)

        small = builder.icmp_signed("<", size, ir.Constant(size.type, WIDTH))
        with builder.if_else(small) as (then, otherwise):
            with then:
                double(4)
            with otherwise:
                double(WIDTH)
        return context.get_dummy_value()

    return types.void(table, at, size, steps), codegen


@intrinsic
def add_rows(
    typingctx: Any,
    tail: Any,
    at: Any,
    count: Any,
    tables: Any,
    first_table: Any,
    sums: Any,
    first_sum: Any,
) -> Any:
    """Add, for every word, the table rows that its four bytes name.

    Words are ``tail`` int32 [at, at + count). ``tables`` float32 [..] holds, from
    ``first_table`` on, 256 rows of four for each byte; ``sums`` float32 [..] a row for
    each word, from ``first_sum`` on. Not slices: numba counts references of those.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words, tables, sums = (
            builder.gep(
                data_of(context, builder, signature, args, which), [args[first]]
            )
            for which, first in ((0, 1), (3, 4), (5, 6))
        )
        count = args[2]
        index = count.type
        with cgutils.for_range(builder, count) as loop:
            word = builder.load(builder.gep(words, [loop.index]))
            target = _floats(
                builder, sums, builder.mul(loop.index, ir.Constant(index, 4))
            )
            rows = []
            for byte in range(4):
                value = builder.lshr(word, ir.Constant(_INT, 8 * byte))
                value = builder.and_(value, ir.Constant(_INT, 255))
                row = builder.shl(builder.zext(value, index), ir.Constant(index, 2))
                row = builder.add(row, ir.Constant(index, 1024 * byte))
                rows.append(builder.load(_floats(builder, tables, row), align=4))
            total = builder.fadd(
                builder.fadd(rows[0], rows[1]), builder.fadd(rows[2], rows[3])
            )
            total = builder.fadd(builder.load(target, align=4), total)
            builder.store(total, target, align=4)
        return context.get_dummy_value()

    return (
        types.void(tail, at, count, tables, first_table, sums, first_sum),
        codegen,
    )


@intrinsic
def join_rows(
    typingctx: Any,
    sums: Any,
    first_sum: Any,
    tail: Any,
    at: Any,
    count: Any,
    factor: Any,
    lines: Any,
) -> Any:
    """Make logits of four queries: the hashed part of each, and what lies along axes.

    What is not finite becomes -inf (`policies.vote.attention_of`).

    Words are ``tail`` int32 [at, at + count), see `Described.words`, a multiple of 4;
    ``sums`` float32 [.. + count * 4] from ``first_sum`` on, in place; ``factor``
    float32, of the hashed part; ``lines`` float32 [2 * 4], the queries' coordinates.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, words = (
            builder.gep(
                data_of(context, builder, signature, args, which), [args[which + 1]]
            )
            for which in (0, 2)
        )
        lines = data_of(context, builder, signature, args, 6)
        factor, count = splat(builder, args[5], 4), args[4]
        index, four_words = count.type, ir.VectorType(_INT, 4)
        each_four_times = _mask([i // 4 for i in range(WIDTH)])
        in_turn = _mask([i % 4 for i in range(WIDTH)])

        def bits(value: int) -> Any:
            return ir.Constant(four_words, [value] * 4)

        def wide(values: Any, lanes: Any) -> Any:
            return builder.shuffle_vector(values, values, lanes)

        axes = []
        for axis in range(2):
            place = _floats(builder, lines, ir.Constant(index, 4 * axis))
            axes.append(wide(builder.load(place, align=4), in_turn))
        with _steps(builder, count, 4) as (i, _unused):
            place = builder.bitcast(builder.gep(words, [i]), four_words.as_pointer())
            word = builder.load(place, align=4)
            step = builder.and_(builder.lshr(word, bits(1)), bits(0x7F800000))
            step = builder.bitcast(step, ir.VectorType(_FLOAT, 4))
            length = builder.and_(builder.lshr(word, bits(16)), bits(255))
            length = builder.sitofp(length, step.type)
            length = builder.fmul(builder.fmul(length, step), factor)
            place = _floats(builder, sums, builder.mul(i, ir.Constant(index, 4)), WIDTH)
            total = builder.load(place, align=4)
            total = builder.fmul(total, wide(length, each_four_times))
            for shift, axis_values in zip((24, 16), axes, strict=True):
                number = builder.ashr(builder.shl(word, bits(shift)), bits(24))
                number = builder.fmul(builder.sitofp(number, step.type), step)
                part = builder.fmul(wide(number, each_four_times), axis_values)
                total = builder.fadd(total, part)
            size = _by_name(builder, "fabs", total)
            finite = builder.fcmp_ordered("<", size, _constant(float("inf")))
            total = builder.select(finite, total, _constant(float("-inf")))
            builder.store(total, place, align=4)
        return context.get_dummy_value()

    return types.void(sums, first_sum, tail, at, count, factor, lines), codegen


@intrinsic
def softmax_rows(typingctx: Any, logits: Any, sums: Any) -> Any:
    """exp(logit - largest logit of its query) in place, and its sum by query.

    ``logits`` float32 [n * 4], n a multiple of 4; ``sums`` float32 [16], written: to be
    added up by query, lanes g, g + 4, ..
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        logits, sums = (
            data_of(context, builder, signature, args, which) for which in range(2)
        )
        array = context.make_array(signature.args[0])(context, builder, args[0])
        top = cgutils.alloca_once_value(builder, _constant(float("-inf")))
        with _steps(builder, array.nitems, WIDTH) as (i, _unused):
            row = builder.load(_floats(builder, logits, i, WIDTH), align=4)
            builder.store(_by_name(builder, "maxnum", builder.load(top), row), top)
        tops = builder.load(top)
        for distance in (4, 8):
            turned = _mask([(i + distance) % WIDTH for i in range(WIDTH)])
            tops = _by_name(
                builder, "maxnum", tops, builder.shuffle_vector(tops, tops, turned)
            )
        total = cgutils.alloca_once_value(builder, _constant(0.0))
        with _steps(builder, array.nitems, WIDTH) as (i, _unused):
            place = _floats(builder, logits, i, WIDTH)
            weight = _exp(builder, builder.fsub(builder.load(place, align=4), tops))
            builder.store(weight, place, align=4)
            builder.store(builder.fadd(builder.load(total), weight), total)
        first = ir.Constant(array.nitems.type, 0)
        builder.store(
            builder.load(total), _floats(builder, sums, first, WIDTH), align=4
        )
        return context.get_dummy_value()

    return types.void(logits, sums), codegen


@intrinsic
def raise_votes(typingctx: Any, weights: Any, shares: Any, votes: Any) -> Any:
    """Raise votes to at least the largest of four queries' weights times its share.

    ``weights`` float32 [n * 4], ``shares`` float32 [4], ``votes`` float32 [n], n a
    multiple of 16.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        weights, shares, votes = (
            data_of(context, builder, signature, args, which) for which in range(3)
        )
        array = context.make_array(signature.args[2])(context, builder, args[2])
        index = array.nitems.type
        share = builder.load(_floats(builder, shares, ir.Constant(index, 0)), align=4)
        share = builder.shuffle_vector(
            share, share, _mask([i % 4 for i in range(4 * WIDTH)])
        )
        with _steps(builder, array.nitems, WIDTH) as (i, _unused):
            first = builder.mul(i, ir.Constant(index, 4))
            rows = builder.load(_floats(builder, weights, first, 4 * WIDTH), align=4)
            rows = builder.fmul(rows, share)
            place = _floats(builder, votes, i, WIDTH)
            largest = builder.load(place, align=4)
            for query in range(4):
                mine = _mask([query + 4 * lane for lane in range(WIDTH)])
                largest = _by_name(
                    builder,
                    "maxnum",
                    largest,
                    builder.shuffle_vector(rows, rows, mine),
                )
            builder.store(largest, place, align=4)
        return context.get_dummy_value()

    return types.void(weights, shares, votes), codegen
