"""Votes of queries on slots, and the selection at the end of a segment (numba).

See `hashevict_vllm.policies.vote` for the rule. A slot's words are the signature of the
rest of its key, three small numbers (`hashevict_vllm.policies.frame`) and its votes, a
float32 whose lowest bits say how large its value is (`OCTAVES`).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hashevict_vllm.kernels.codes import (
    AHEAD,
    NEIGHBOURS,
    OCTAVES,
    RECENT_IN_SELECTION,
    SMOOTH,
)
from hashevict_vllm.kernels.cpu.ballot import (
    WIDTH,
    add_rows,
    double_table,
    join_rows,
    raise_votes,
    softmax_rows,
)
from hashevict_vllm.kernels.cpu.frame import split_queries
from hashevict_vllm.kernels.cpu.hash import project_rows
from hashevict_vllm.kernels.cpu.slots import (
    prefetch_rows,
    row_size,
    tail_of,
    word_of,
)
from hashevict_vllm.kernels.cpu.tokens import load_queries
from hashevict_vllm.kernels.cpu.value import add_credit, add_spread

BALLOT_AHEAD = 8
"""Blocks that are asked for ahead of the estimate of their logits."""


@njit
def _fill_tables(projected, b, group, first, tables):
    """What every byte of a signature adds to the logits of four queries.

    Args:
        projected: t = q R of all G queries, float32 [G * b].
        b: Bits of a signature.
        group: G.
        first: First of the four queries; those beyond G, and bits beyond b, add zero.
        tables: float32 [4 W * 256 * 4], written: for each byte of a signature, each of
            its values and each query, sum_j t_j s_j over the byte's bits.

    """
    steps = np.zeros(4, np.float32)
    for byte in range(len(tables) // 1024):
        at, size = byte * 1024, np.int64(4)
        tables[at : at + 4] = np.float32(0)
        for j in range(byte * 8, byte * 8 + 8):
            for g in range(4):
                known = first + g < group and j < b
                steps[g] = projected[(first + g) * b + j] if known else np.float32(0)
            double_table(tables, at, size, steps)
            size *= 2


@njit
def _pair_up(along, group, first, scale, lines):
    """Coordinates of four queries, scaled, axis by axis.

    ``along`` float32 [G * 2]; ``lines`` float32 [2 * 4], written, 0 beyond G.
    """
    for axis in range(2):
        for g in range(4):
            known = first + g < group
            value = along[2 * (first + g) + axis] * scale if known else np.float32(0)
            lines[4 * axis + g] = value


@njit(fastmath={"contract"})
def _fade_and_add(words, decay, new_votes, changed):
    """Decay the votes in ``words`` int32 [n] and add the new ones; octaves stay.

    ``changed`` float32 [>= n] is scratch.
    """
    octaves, bits = np.int32(OCTAVES), changed.view(np.int32)
    for i in range(len(words)):
        bits[i] = words[i] & ~octaves
    for i in range(len(words)):
        changed[i] = changed[i] * decay + new_votes[i]
    for i in range(len(words)):
        words[i] = (bits[i] & ~octaves) | (words[i] & octaves)


@njit
def _slot_at(pages, blocks, num_slots, head, t):
    """The slot of position ``t``; ``num_slots`` if there is none."""
    block_size, row = pages.block_size, pages.words * row_size(pages)
    for first in range(0, num_slots, block_size):
        at = tail_of(pages, blocks, first, head) + row
        position = pages.tail[at : at + min(block_size, num_slots - first)]
        found = np.int32(block_size)
        for i in range(len(position)):
            found = min(found, np.int32(i) if position[i] == t else found)
        if found < block_size:
            return first + np.int64(found)
    return num_slots


@njit
def cast_votes(pages, rule, tokens, row, blocks, num_slots, head, frame, t):
    """Let the G queries of a row vote on the first ``num_slots`` slots of a request.

    ``frame`` float64 [3 D]. ``t`` is the position of a decoding token, whose ballot
    first fades earlier votes, and passes over its own slot; negative in a segment.
    """
    block_size, tail = pages.block_size, pages.tail
    hashed, size = pages.words - 2, row_size(pages)
    group, dim, bits = tokens.group, pages.dim, rule.bits
    room = (num_slots + block_size - 1) // block_size * block_size
    x, projected = np.empty(group * dim, np.float32), np.empty(group * bits, np.float32)
    tables, logits = np.empty(hashed * 4096, np.float32), np.empty(4 * room, np.float32)
    sums, shares = np.empty(WIDTH, np.float32), np.empty(4, np.float32)
    votes = np.zeros(room, np.float32)
    along, lines = np.empty(2 * group, np.float32), np.empty(8, np.float32)
    own = _slot_at(pages, blocks, num_slots, head, t) if t >= 0 else num_slots
    load_queries(pages, tokens, row, head, x)
    split_queries(x, frame, group, along)
    project_rows(x, rule.projection, projected, group)
    for first_query in range(0, group, 4):
        _fill_tables(projected, bits, group, first_query, tables)
        _pair_up(along, group, first_query, rule.scale, lines)
        logits[:] = np.float32(0)
        for first in range(0, num_slots, block_size):
            prefetch_rows(
                pages,
                blocks,
                first + BALLOT_AHEAD * block_size,
                min(num_slots, first + (BALLOT_AHEAD + 1) * block_size),
                head,
                0,
                pages.words + 1,
            )
            base = tail_of(pages, blocks, first, head)
            for w in range(hashed):
                at = base + w * size
                add_rows(tail, at, block_size, tables, w * 4096, logits, 4 * first)
            at = base + hashed * size
            join_rows(logits, 4 * first, tail, at, block_size, rule.gain, lines)
        logits[4 * num_slots :] = np.float32(-np.inf)
        logits[4 * own : 4 * own + 4] = np.float32(-np.inf)
        softmax_rows(logits, sums)
        for g in range(4):
            total = sums[g] + sums[g + 4] + sums[g + 8] + sums[g + 12]
            # Queries beyond the group have no say, nor those without a finite logit:
            # the largest of any others has a weight of 1.
            known = first_query + g < group and total > np.float32(0.5)
            shares[g] = np.float32(1) / total if known else np.float32(0)
        raise_votes(logits, shares, votes)
    if t >= 0 and rule.value_votes > 0:
        share = rule.value_votes
        add_spread(pages, blocks, num_slots, head, own, share, votes)
    if own < num_slots:
        votes[own] = np.float32(0)
    decay = rule.decay if t >= 0 else np.float32(1)
    for first in range(0, num_slots, block_size):
        count = min(block_size, num_slots - first)
        at = tail_of(pages, blocks, first, head) + (hashed + 1) * size
        words, new_votes = tail[at : at + count], votes[first : first + count]
        _fade_and_add(words, decay, new_votes, logits)


@njit
def _pool(position, votes, pool):
    """Smooth and pool votes [n] of slots sorted by ``position``; float32 [n]."""
    n = len(position)
    smooth, pooled = np.empty(n, np.float32), np.empty(n, np.float32)
    if pool == 1:
        pooled[:] = votes
        return pooled
    share = np.float32(1) / np.float32(2 * SMOOTH + 1)
    first = 0
    for i in range(n):
        while position[i] - position[first] > SMOOTH:
            first += 1
        total = np.float32(0)
        j = first
        while j < n and position[j] - position[i] <= SMOOTH:
            total += votes[j]
            j += 1
        smooth[i] = total * share
    first = 0
    for i in range(n):
        while position[i] - position[first] >= pool - AHEAD:
            first += 1
        best = np.float32(0)
        j = first
        while j < n and position[j] - position[i] <= AHEAD:
            best = max(best, smooth[j])
            j += 1
        pooled[i] = best
    return pooled


@njit
def mark_losers(pages, rule, blocks, num_slots, head, end, goes_on, budget, recent):
    """Mark all but ``budget`` of the slots ``~position``: those of the least merit.

    That is votes pooled over ``rule.pool`` positions, and credit for unusual values
    (`hashevict_vllm.policies.vote`); a slot keeps its own votes, but at least
    `NEIGHBOURS` of its merit. Sinks and the last ``recent`` positions before ``end``
    (`RECENT_IN_SELECTION` at most) are protected; ties keep the newer slot.
    ``goes_on`` says whether the prompt does.
    """
    words, size, tail = pages.words, row_size(pages), pages.tail
    position = np.empty(num_slots, np.int32)
    votes = np.empty(num_slots, np.float32)
    bits, octaves = votes.view(np.int32), np.int32(OCTAVES)
    for slot in range(num_slots):
        at = word_of(pages, blocks, slot, head)
        position[slot] = tail[at + words * size]
        bits[slot] = tail[at + (words - 1) * size] & ~octaves
    order = np.argsort(position)
    position, votes = position[order], votes[order]
    bits = votes.view(np.int32)
    merit = _pool(position, votes, rule.pool)
    if rule.credit > 0:
        add_credit(pages, rule, blocks, head, position, order, goes_on, budget, merit)
    for i in range(num_slots):
        at = word_of(pages, blocks, order[i], head) + (words - 1) * size
        votes[i] = max(votes[i], np.float32(NEIGHBOURS) * merit[i])
        tail[at] = (bits[i] & ~octaves) | (tail[at] & octaves)
    ranked = np.argsort(merit, kind="mergesort")
    left = num_slots - budget
    stop = end - min(recent, RECENT_IN_SELECTION)
    for i in ranked:
        if left == 0:
            break
        if position[i] < rule.sinks or position[i] >= stop:
            continue
        at = word_of(pages, blocks, order[i], head) + words * size
        tail[at] = ~position[i]
        left -= 1
