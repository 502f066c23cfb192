"""Scores of slots and the search for the victim (device functions).

As in `hashevict_vllm.kernels.cpu.scores`: a score is an int32 of at least 0; the
largest is evicted, ties go to the oldest position.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.triton.bits import mix, popcount
from hashevict_vllm.kernels.triton.slots import meta_of

HAMMING_TO_KEY = tl.constexpr(codes.HAMMING_TO_KEY)
HAMMING_TO_QUERY = tl.constexpr(codes.HAMMING_TO_QUERY)
RECENCY = tl.constexpr(codes.RECENCY)
NORM = tl.constexpr(codes.NORM)
RANDOM = tl.constexpr(codes.RANDOM)
VOTE = tl.constexpr(codes.VOTE)

_INT32_MAX = tl.constexpr(2**31 - 1)
# x ^ _INT32_MAX is 2^31 - 1 - x for x >= 0.


@triton.jit
def _summed_distance(
    meta,
    used,
    sources,
    word_stride,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Hamming distances int32 [n] of slots to signatures [FIRST, END), summed."""
    distance = tl.zeros(used.shape, tl.int32)
    for w in tl.static_range(WORDS):
        word = tl.load(meta + w * word_stride, mask=used, other=0)
        for g in tl.static_range(FIRST, END):
            distance += popcount(word ^ tl.load(sources + g * WORDS + w))
    return distance


@triton.jit
def slot_scores(
    meta,
    used,
    position,
    sources,
    t,
    word_stride,
    rule: tl.constexpr,
    sizes: tl.constexpr,
):
    """How dispensable slots are: int32 [n], see the rules in `policies`.

    Args:
        meta: Pointers [n] to the slots' first words (`meta_of`).
        used: bool [n].
        position: int32 [n].
        sources: int32 pointer to the token's signatures [G + 1, W], the key's last.
        t: int32, position of the new token.
        word_stride: Words between two words of a slot.
        rule: `DeviceRule`.
        sizes: `Sizes`.

    """
    group: tl.constexpr = sizes.group
    if rule.kind == HAMMING_TO_QUERY:
        return _summed_distance(meta, used, sources, word_stride, 0, group, rule.words)
    elif rule.kind == HAMMING_TO_KEY:
        return _summed_distance(
            meta, used, sources, word_stride, group, group + 1, rule.words
        )
    elif rule.kind == NORM:
        return tl.load(meta, mask=used, other=0)  # bits order as the float does
    elif rule.kind == RANDOM:
        return mix(position, t, rule.salt)
    elif rule.kind == VOTE:
        votes = tl.load(meta + (rule.words - 1) * word_stride, mask=used, other=0)
        # Fewest first; nearly equal ones tie.
        return ((votes >> 16) ^ 0x7FFF) & 0x7FFF
    else:
        tl.static_assert(rule.kind == RECENCY, "no such kind of score")
        return tl.zeros(used.shape, tl.int32)


@triton.jit
def _orders(
    at,
    slots,
    live,
    sources,
    t,
    recent,
    rule: tl.constexpr,
    sizes: tl.constexpr,
):
    """What `find_victims` compares, int64 [n] of slots int32 [n]: -1 if protected."""
    word = at.page.word
    used = slots < live
    meta = meta_of(at, slots, used, sizes)
    position = tl.load(meta + rule.words * word, mask=used, other=-1)
    score = slot_scores(meta, used, position, sources, t, word, rule, sizes)
    allowed = (position >= rule.sinks) & (position <= t - 1 - recent)
    order = (score.to(tl.int64) << 32) | (position ^ _INT32_MAX).to(tl.int64)
    return tl.where(used & allowed, order, -1)


@triton.jit
def find_victims(
    at,
    live,
    sources,
    t,
    recent,
    rule: tl.constexpr,
    sizes: tl.constexpr,
    TILE: tl.constexpr,
    ONCE: tl.constexpr,
):
    """Scan the first ``live`` slots; every lane keeps the best of those it saw.

    Positions below the sinks or above ``t - 1 - recent`` are protected; slots marked
    ``~position`` are dead and, being negative, below the sinks.

    Args:
        at: `Head`.
        live: int32, slots that stand before the token.
        sources: See `slot_scores`.
        t: See `slot_scores`.
        recent: int32, the most recent tokens that are never evicted.
        rule: `DeviceRule`.
        sizes: `Sizes`.
        TILE: Slots per step.
        ONCE: No more than ``TILE`` slots are live, so that there is one step.

    Returns:
        int64 [TILE], score and age in one number that orders victims, -1 for none; its
        low half is ``2^31 - 1 - position``. int32 [TILE], the slots. Positions are
        distinct, so the largest number belongs to one lane.

    """
    lane = tl.arange(0, TILE)
    if ONCE:
        return _orders(at, lane, live, sources, t, recent, rule, sizes), lane
    else:
        best = tl.full([TILE], -1, tl.int64)
        best_slot = tl.zeros([TILE], tl.int32)
        for first in range(0, live, TILE):
            slots = first + lane
            order = _orders(at, slots, live, sources, t, recent, rule, sizes)
            better = order > best
            best = tl.where(better, order, best)
            best_slot = tl.where(better, slots, best_slot)
        return best, best_slot


@triton.jit
def position_of(order):
    """The position that a number of `find_victims` holds, int32."""
    return (order & 0xFFFFFFFF).to(tl.int32) ^ _INT32_MAX
