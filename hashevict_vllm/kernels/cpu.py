"""numba kernels: fused hash + scan + write, and the replay that reduces a segment.

They address slots of one KV head inside vLLM's pages (`hashevict_vllm.cache.page`).
Inner loops run over slices, as a signed scalar index costs numba a wrap-around test per
element. They run on one thread: beside the attention kernels' OpenMP pool a second one
makes each wait for the other's spinning threads (20 times slower steps were seen).
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

logger = logging.getLogger("vllm.hashevict_vllm.kernels")

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
"""How the raw bits of a K/V or query element are to be read."""

_FP16_REBIAS = np.float32(2.0**112)
_INT32_MAX = np.int32(2**31 - 1)


def _kernel(function: Any) -> Any:
    """Compile, with numba's disk cache where there is a place to write one.

    ``NUMBA_CACHE_DIR`` names one; else it is beside this file or in the user's cache.
    """
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba: "no locator available", as on a read-only system
        logger.info("No writable cache for compiled kernels; set NUMBA_CACHE_DIR.")
        return njit(nogil=True)(function)


@intrinsic
def _popcount(typingctx: Any, value: Any) -> Any:
    """Population count of an int32, as LLVM's ctpop, which vectorises to vpopcntd."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(builder.trunc(args[0], ir.IntType(32)))

    return types.int32(types.int32), codegen


@njit(inline="always")
def _load(raw, kind, out):
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


@njit(fastmath={"contract"})
def _hash(x, projection, dots, words):
    """Signature of x [D]: bit j is ``x . r_j >= 0``, packed into ``words`` [W].

    ``projection`` is R, row-major and flat; ``dots`` [b] is scratch. Eight rows of R at
    a time halve the time of one by one, as 1-D slices do of 2-D indexing.
    """
    b = len(dots)
    dots[:] = np.float32(0)
    for d in range(0, len(x), 8):
        at = d * b
        r0, r1 = projection[at : at + b], projection[at + b : at + 2 * b]
        r2, r3 = (
            projection[at + 2 * b : at + 3 * b],
            projection[at + 3 * b : at + 4 * b],
        )
        r4, r5 = (
            projection[at + 4 * b : at + 5 * b],
            projection[at + 5 * b : at + 6 * b],
        )
        r6, r7 = (
            projection[at + 6 * b : at + 7 * b],
            projection[at + 7 * b : at + 8 * b],
        )
        x0, x1, x2, x3 = x[d], x[d + 1], x[d + 2], x[d + 3]
        x4, x5, x6, x7 = x[d + 4], x[d + 5], x[d + 6], x[d + 7]
        for j in range(b):
            dots[j] += ((x0 * r0[j] + x1 * r1[j]) + (x2 * r2[j] + x3 * r3[j])) + (
                (x4 * r4[j] + x5 * r5[j]) + (x6 * r6[j] + x7 * r7[j])
            )
    for w in range(len(words)):
        word = np.uint32(0)
        chunk = dots[w * 32 : min(w * 32 + 32, b)]
        for j in range(len(chunk)):
            word |= np.uint32(chunk[j] >= 0) << np.uint32(j)
        words[w] = np.int32(word)


@njit(inline="always")
def _tail_of(blocks, slot, head, geometry):
    """First tail word of the (block, head) that holds a slot."""
    block = np.int64(blocks[slot // geometry[1]])
    rows = (geometry[3] + 1) * geometry[1]
    return block * geometry[5] + geometry[6] + head * rows


@njit(inline="always")
def _elements_of(blocks, slot, head, geometry):
    """First K/V element of the (block, head) that holds a slot."""
    block = np.int64(blocks[slot // geometry[1]])
    return block * geometry[4] + head * 2 * geometry[1] * geometry[2]


@njit(inline="always")
def _find_victim(
    tail, blocks, num_slots, head, sources, lowest, highest, geometry, distance
):
    """The slot with the largest summed Hamming distance; ties to the oldest position.

    ``sources`` int32 [G, W] are the signatures compared with; only positions in
    [lowest, highest] may be evicted, which also leaves out slots marked ``~position``.
    """
    block_size, words = geometry[1], geometry[3]
    best, best_position, best_block = np.int32(-1), _INT32_MAX, 0
    for j in range((num_slots + block_size - 1) // block_size):
        count = min(block_size, num_slots - j * block_size)
        base = _tail_of(blocks, j * block_size, head, geometry)
        dist = distance[:count]
        dist[:] = np.int32(0)
        for w in range(words):
            start = base + w * block_size
            row = tail[start : start + count]
            for g in range(sources.shape[0]):
                word = sources[g, w]
                for i in range(count):
                    dist[i] += _popcount(row[i] ^ word)
        start = base + words * block_size
        position = tail[start : start + count]
        top = np.int32(-1)
        for i in range(count):
            allowed = position[i] >= lowest and position[i] <= highest
            dist[i] = dist[i] if allowed else np.int32(-1)
            top = max(top, dist[i])
        if top >= best and top >= 0:
            oldest = _INT32_MAX
            for i in range(count):
                oldest = min(oldest, position[i] if dist[i] == top else _INT32_MAX)
            if top > best or oldest < best_position:
                best, best_position, best_block = top, oldest, j
    start = _tail_of(blocks, best_block * block_size, head, geometry)
    start += words * block_size
    position = tail[start : start + block_size]
    for i in range(block_size):
        if position[i] == best_position:
            return best_block * block_size + i
    return -1


@_kernel
def write_tokens(
    elements,
    tail,
    q,
    k,
    v,
    rows,
    positions,
    slots,
    evict,
    requests,
    block_table,
    projection,
    k_map,
    v_map,
    geometry,
    rule,
):
    """Hash, choose the slot, write K, V, signature and position of single tokens.

    Design 1.2. Tokens of one request must not depend on each other's slots: at most one
    evicting token per request and call.

    Args:
        elements: Raw K/V elements of the layer, unsigned [..], see `LayerPages`.
        tail: int32 view of the same bytes.
        q: Raw elements [T, Hq, D].
        k: Raw elements [T, Hkv, D].
        v: Raw elements [T, Hkv, D].
        rows: int32 [n], rows of q, k, v.
        positions: int32 [n], absolute positions.
        slots: int32 [n], slot to append to; the number of live slots if evicting.
        evict: bool [n], whether to overwrite the victim instead of appending.
        requests: int32 [n], rows of the block table.
        block_table: int32 [R, max blocks].
        projection: float32 [D * b], R row-major.
        k_map: int32 [N, D], element of K[slot, d] within a (block, head).
        v_map: int32 [N, D], the same for V.
        geometry: int64 [9]: H, N, D, W, element stride and word stride of a block,
            first tail word of a page, element kind, b.
        rule: int64 [3]: sinks, recent, whether the query is the hash source.

    """
    heads, block_size, dim, words = geometry[0], geometry[1], geometry[2], geometry[3]
    group = q.shape[1] // heads
    for task in range(len(rows) * heads):
        n = task // heads
        head = task % heads
        row, request = rows[n], requests[n]
        blocks = block_table[request]
        x = np.empty(dim, np.float32)
        dots = np.empty(geometry[8], np.float32)
        signature = np.empty(words, np.int32)
        _load(k[row, head], geometry[7], x)
        _hash(x, projection, dots, signature)
        slot = np.int64(slots[n])
        if evict[n]:
            distance = np.empty(block_size, np.int32)
            highest = np.int32(positions[n] - 1 - rule[1])
            if rule[2]:
                sources = np.empty((group, words), np.int32)
                for g in range(group):
                    _load(q[row, head * group + g], geometry[7], x)
                    _hash(x, projection, dots, sources[g])
            else:
                sources = signature.reshape((1, words))
            slot = _find_victim(
                tail,
                blocks,
                slot,
                head,
                sources,
                np.int32(rule[0]),
                highest,
                geometry,
                distance,
            )
        offset = slot % block_size
        start = _elements_of(blocks, slot, head, geometry)
        page = elements[start : start + 2 * block_size * dim]
        key, value = k[row, head], v[row, head]
        key_at, value_at = k_map[offset], v_map[offset]
        for d in range(dim):
            page[key_at[d]] = key[d]
            page[value_at[d]] = value[d]
        start = _tail_of(blocks, slot, head, geometry)
        meta = tail[start : start + (words + 1) * block_size]
        for w in range(words):
            meta[w * block_size + offset] = signature[w]
        meta[words * block_size + offset] = positions[n]


@njit(inline="always")
def _replay_head(tail, q, piece, blocks, head, projection, geometry, rule, budget):
    """Mark, for one (piece, KV head), the victims of the tokens beyond the budget."""
    block_size, dim, words = geometry[1], geometry[2], geometry[3]
    group = q.shape[1] // geometry[0]
    first_slot, count = np.int64(piece[4]), np.int64(piece[2])
    distance = np.empty(block_size, np.int32)
    x = np.empty(dim, np.float32)
    dots = np.empty(geometry[8], np.float32)
    sources = np.empty((group if rule[2] else 1, words), np.int32)
    for i in range(max(budget - first_slot, 0), count):
        slot = first_slot + i
        if rule[2]:
            for g in range(group):
                _load(q[piece[3] + i, head * group + g], geometry[7], x)
                _hash(x, projection, dots, sources[g])
        else:
            at = _tail_of(blocks, slot, head, geometry) + slot % block_size
            for w in range(words):
                sources[0, w] = tail[at + w * block_size]
        victim = _find_victim(
            tail,
            blocks,
            slot,
            head,
            sources,
            np.int32(rule[0]),
            np.int32(piece[1] + i - 1 - rule[1]),
            geometry,
            distance,
        )
        at = _tail_of(blocks, victim, head, geometry)
        at += words * block_size + victim % block_size
        tail[at] = ~tail[at]


@njit(inline="always")
def _compact_head(elements, tail, end, blocks, head, k_map, v_map, geometry, budget):
    """Move survivors in slots [budget, end) into the marked slots, in slot order."""
    block_size, dim, words = geometry[1], geometry[2], geometry[3]
    rows, size = (words + 1) * block_size, 2 * block_size * dim
    hole = np.int64(-1)
    for slot in range(budget, end):
        at = _tail_of(blocks, slot, head, geometry)
        source_meta, offset = tail[at : at + rows], slot % block_size
        if source_meta[words * block_size + offset] < 0:
            continue
        position = np.int32(0)
        while position >= 0:
            hole += 1
            at = _tail_of(blocks, hole, head, geometry)
            position = tail[at + words * block_size + hole % block_size]
        target_meta, target_offset = tail[at : at + rows], hole % block_size
        for w in range(0, rows, block_size):
            target_meta[w + target_offset] = source_meta[w + offset]
        at = _elements_of(blocks, slot, head, geometry)
        source = elements[at : at + size]
        at = _elements_of(blocks, hole, head, geometry)
        target = elements[at : at + size]
        for d in range(dim):
            target[k_map[target_offset, d]] = source[k_map[offset, d]]
            target[v_map[target_offset, d]] = source[v_map[offset, d]]


@_kernel
def replay_segments(
    elements,
    tail,
    q,
    pieces,
    block_table,
    projection,
    k_map,
    v_map,
    geometry,
    rule,
    budget,
):
    """Replay the decode rule for tokens beyond the budget; compact complete segments.

    Design 1.3. Victims are marked ``~position`` and stay in place, as later tokens of
    the open segment still attend to them. A complete segment is compacted: survivors
    beyond the budget move into the marked slots, in order of their slots.

    Args:
        elements: As `write_tokens`, here only moved.
        tail: As `write_tokens`; holds the piece's signatures and positions already.
        q: Raw elements [T, Hq, D].
        pieces: int32 [n, 6]: request, start position, count, row, slot, compact.
        block_table: int32 [R, max blocks].
        projection: float32 [D * b], R row-major.
        k_map: int32 [N, D].
        v_map: int32 [N, D].
        geometry: As `write_tokens`.
        rule: As `write_tokens`.
        budget: C.

    """
    heads = geometry[0]
    for task in range(len(pieces) * heads):
        piece, head = pieces[task // heads], task % heads
        blocks = block_table[piece[0]]
        _replay_head(tail, q, piece, blocks, head, projection, geometry, rule, budget)
        if piece[5]:
            end = np.int64(piece[4]) + np.int64(piece[2])
            _compact_head(
                elements, tail, end, blocks, head, k_map, v_map, geometry, budget
            )


def warm_up(dtype: np.dtype) -> None:
    """Compile (or load from numba's disk cache) the kernels for one element type.

    Args:
        dtype: Unsigned integer type of the raw K/V elements.

    """
    elements, tail = np.zeros(1, dtype), np.zeros(1, np.int32)
    x = np.zeros((1, 1, 1), dtype)
    none, table = np.zeros(0, np.int32), np.zeros((1, 1), np.int32)
    maps = np.zeros((1, 1), np.int32)
    projection = np.zeros(1, np.float32)
    geometry, rule = np.ones(9, np.int64), np.zeros(3, np.int64)
    write_tokens(
        elements,
        tail,
        x,
        x,
        x,
        none,
        none,
        none,
        np.zeros(0, bool),
        none,
        table,
        projection,
        maps,
        maps,
        geometry,
        rule,
    )
    replay_segments(
        elements,
        tail,
        x,
        np.zeros((0, 6), np.int32),
        table,
        projection,
        maps,
        maps,
        geometry,
        rule,
        1,
    )
