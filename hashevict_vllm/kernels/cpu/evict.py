"""What an evicting token overwrites: its description, the scan, the victims (numba)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from hashevict_vllm.kernels.codes import (
    HAMMING_TO_KEY,
    HAMMING_TO_QUERY,
    KEY_DIFF,
    RANDOM,
    RECENCY,
    VOTE,
)
from hashevict_vllm.kernels.cpu.frame import leave_undescribed
from hashevict_vllm.kernels.cpu.hamming import merge, merged_shape
from hashevict_vllm.kernels.cpu.jit import inlined
from hashevict_vllm.kernels.cpu.scan import BEST_SIZE, best_slot, reset_best
from hashevict_vllm.kernels.cpu.scores import (
    describe_key,
    find_victim,
    merge_queries,
    scan_block,
)
from hashevict_vllm.kernels.cpu.slots import (
    copy_in,
    prefetch_rows,
    prefetch_slot,
    write_words,
)
from hashevict_vllm.kernels.cpu.tokens import load_new_key, load_new_value
from hashevict_vllm.kernels.cpu.value import octave_of
from hashevict_vllm.kernels.cpu.views import unowned

BLOCKS_AHEAD = 4
"""Blocks whose metadata are asked for before a scan; then one by one, as it goes on."""


class Evicting(NamedTuple):
    """A token that overwrites a slot per KV head.

    Attributes:
        row: Of q, k and v.
        t: Its position.
        num_slots: Live slots of its request.
        recent: The most recent tokens that its request never evicts.
        blocks: int32 [..], blocks of its request.

    """

    row: np.int64
    t: np.int64
    num_slots: np.int64
    recent: np.int64
    blocks: np.ndarray


class Chosen(NamedTuple):
    """What is made of an evicting token, by KV head.

    Attributes:
        words: int32 [H, 1, W], what its slot keeps of its key.
        merged: int32 [H, .., W], what signatures are compared with (`merge`).
        best: int32 [H, BEST_SIZE], see `scan`.
        victims: int64 [H], slots.

    """

    words: np.ndarray
    merged: np.ndarray
    best: np.ndarray
    victims: np.ndarray


@njit
def new_chosen(pages, scratch):
    """`Chosen` for the evicting tokens of a thread, one after the other."""
    heads, words = pages.heads, pages.words
    shape = merged_shape(scratch.sources.shape[0], words)
    return Chosen(
        np.zeros((heads, 1, words), np.int32),
        np.zeros((heads, shape[0], shape[1]), np.int32),
        np.empty((heads, BEST_SIZE), np.int32),
        np.zeros(heads, np.int64),
    )


@njit
def unowned_chosen(own):
    """The same arrays, unowned, as `unowned_scratch`."""
    return Chosen(
        unowned(own.words),
        unowned(own.merged),
        unowned(own.best),
        unowned(own.victims),
    )


@njit
def rows_read(pages, rule):
    """The rows [first, end) of a tail that a scan reads.

    Positions are left out where only the few blocks with a new best slot need them.
    """
    words = pages.words
    if rule.score == RECENCY or rule.score == RANDOM:
        return words, words + 1
    if rule.score == VOTE:
        return words - 1, words
    return np.int64(0), words


@inlined
def look_ahead(pages, rule, token, head):
    """Ask for what the beginning of one head's scan reads."""
    end = min(BLOCKS_AHEAD * pages.block_size, token.num_slots)
    row, last_row = rows_read(pages, rule)
    prefetch_rows(pages, token.blocks, 0, end, head, row, last_row)


@inlined
def describe_new(pages, rule, tokens, token, head, scratch, chosen):
    """Describe an evicting token's key, and what slots are to be compared with.

    Written: this head's ``words`` and ``merged``. With votes the next ballot describes.
    """
    key, words = scratch.key, chosen.words[head]
    if rule.score == VOTE:
        leave_undescribed(words[0])
        load_new_value(pages, tokens, token.row, head, key)
        words[0, pages.words - 1] = octave_of(key)
        return
    load_new_key(pages, tokens, token.row, head, key)
    describe_key(key, rule, scratch.key_dots, words[0])
    if rule.score == HAMMING_TO_QUERY:
        merge_queries(
            pages, rule, tokens, token.row, head, scratch, chosen.merged[head]
        )
    elif rule.score == HAMMING_TO_KEY:
        merge(words, chosen.merged[head])


@inlined
def choose_victims(pages, rule, token, low, high, scratch, chosen):
    """Choose victims in heads [low, high) and write what slots keep of the token."""
    block_size, blocks, t = pages.block_size, token.blocks, token.t
    num_slots, recent, scores = token.num_slots, token.recent, scratch.scores
    merged, best = chosen.merged, chosen.best
    scores[:] = np.int32(0)
    for head in range(low, high):
        reset_best(best[head])
    row, last_row = rows_read(pages, rule)
    for first in range(0, num_slots if rule.score != KEY_DIFF else 0, block_size):
        ahead = first + BLOCKS_AHEAD * block_size
        for head in range(low, high):
            if ahead < num_slots:
                prefetch_rows(pages, blocks, ahead, ahead + 1, head, row, last_row)
            scan_block(
                pages,
                rule,
                blocks,
                first,
                num_slots,
                head,
                t,
                recent,
                merged,
                scores,
                best,
            )
    for head in range(low, high):
        slot = best_slot(best[head])
        if rule.score == KEY_DIFF:
            slot = find_victim(
                pages,
                rule,
                blocks,
                num_slots,
                head,
                t,
                recent,
                merged,
                scores,
                best,
            )
        if slot < 0:
            raise RuntimeError("no slot may be evicted")
        chosen.victims[head] = slot
        write_words(pages, blocks, slot, head, chosen.words[head, 0], t)


@inlined
def overwrite(pages, tokens, token, victims, low, high):
    """Write K and V of a token over its victims in heads [low, high)."""
    for head in range(low, high):
        for ahead in range(low if head == low else head + 1, min(head + 2, high)):
            prefetch_slot(pages, token.blocks, victims[ahead], ahead)
        copy_in(pages, tokens, token.row, token.blocks, victims[head], head)
