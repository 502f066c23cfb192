"""Appending tokens to a request that is below its budget, or in a prompt (numba)."""

from __future__ import annotations

import numpy as np

from hashevict_vllm.kernels.codes import VOTE
from hashevict_vllm.kernels.cpu.frame import (
    AT_ONCE,
    describe_in,
    describe_slots,
    frame_of,
    last_group,
    leave_undescribed,
)
from hashevict_vllm.kernels.cpu.jit import inlined
from hashevict_vllm.kernels.cpu.scores import describe_key
from hashevict_vllm.kernels.cpu.slots import copy_in, write_words
from hashevict_vllm.kernels.cpu.tokens import load_new_key, load_new_value
from hashevict_vllm.kernels.cpu.value import octave_of


@inlined
def append_tokens(
    pages,
    rule,
    tokens,
    rows,
    positions,
    slots,
    blocks,
    head,
    lanes,
    scratch,
    frame,
):
    """Append tokens of one request to one KV head.

    ``rows``, ``positions`` and ``slots`` int32 [n]; ``lanes`` as `adjacent_keys`;
    ``frame`` float64 [3 D] is scratch. A single token is described for votes with its
    neighbours, see `AT_ONCE`.
    """
    x, key, words = scratch.x, scratch.key, scratch.words
    votes, first = rule.score == VOTE, np.int64(slots[0])
    late = votes and len(rows) == 1 and (first + 1) % AT_ONCE != 0
    if votes and not late and positions[0] >= rule.sinks:
        frame_of(pages, blocks, head, lanes, rule.sinks, x, frame)
        describe_slots(
            pages, rule, blocks, last_group(first), first, head, frame, scratch
        )
    for i in range(len(rows)):
        slot, position = np.int64(slots[i]), positions[i]
        load_new_key(pages, tokens, rows[i], head, key)
        if votes and late:
            leave_undescribed(words)
        elif votes and position >= rule.sinks:
            describe_in(key, frame, rule.projection, scratch.key_dots, words)
        else:
            describe_key(key, rule, scratch.key_dots, words)
        if votes:
            load_new_value(pages, tokens, rows[i], head, key)
            words[len(words) - 1] = octave_of(key)
        write_words(pages, blocks, slot, head, words, position)
        copy_in(pages, tokens, rows[i], blocks, slot, head)
        if votes and position == rule.sinks - 1:
            frame_of(pages, blocks, head, lanes, rule.sinks, x, frame)
            describe_slots(pages, rule, blocks, 0, rule.sinks, head, frame, scratch)
            words[:] = 0
