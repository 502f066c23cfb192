"""How tokens are written: hash, choose the slot, write K, V and what a slot keeps.

The work of a step is cut into items, one per (request, KV head), so that threads can
share it; what a thread does is in `write_items`.

An evicting token costs memory accesses far apart: 128 lines of a page for a transposed
key, and a run of every block for the scan. So requests follow each other in a pipeline.
While the queries of one are hashed, its first blocks come from memory, and so do the
lines that the request before will overwrite. The scan goes block by block, all heads of
it, as their metadata are neighbours in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from hashevict_vllm.kernels.codes import VOTE
from hashevict_vllm.kernels.cpu.append import append_tokens
from hashevict_vllm.kernels.cpu.evict import (
    Evicting,
    choose_victims,
    describe_new,
    look_ahead,
    new_chosen,
    overwrite,
    unowned_chosen,
)
from hashevict_vllm.kernels.cpu.frame import adjacent_keys
from hashevict_vllm.kernels.cpu.jit import inlined
from hashevict_vllm.kernels.cpu.layer import hold, new_scratch, unowned_scratch
from hashevict_vllm.kernels.cpu.slots import copy_in, prefetch_slot


class Writes(NamedTuple):
    """The single tokens of a step; see `kernels.cpu.launch.write_tokens`.

    Attributes:
        rows: int32 [n].
        positions: int32 [n].
        slots: int32 [n].
        evict: bool [n].
        recent: int32 [n].
        requests: int32 [n].
        block_table: int32 [R, max blocks].

    """

    rows: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    evict: np.ndarray
    recent: np.ndarray
    requests: np.ndarray
    block_table: np.ndarray


@inlined
def _evicting(writes, n):
    """Token ``n`` of a step as `Evicting`."""
    return Evicting(
        np.int64(writes.rows[n]),
        np.int64(writes.positions[n]),
        np.int64(writes.slots[n]),
        np.int64(writes.recent[n]),
        writes.block_table[writes.requests[n]],
    )


@njit
def write_items(pages, rule, tokens, writes, first, last):
    """Write items [first, last), numbered request by request, head by head."""
    rows, requests = writes.rows, writes.requests
    if len(rows) == 0:
        return
    heads = pages.heads
    own_scratch = new_scratch(pages, rule, tokens)
    own_chosen = new_chosen(pages, own_scratch)
    scratch, chosen = unowned_scratch(own_scratch), unowned_chosen(own_chosen)
    votes = rule.score == VOTE
    lanes = adjacent_keys(pages.k_map, rule.sinks if votes else 0)
    frame = np.empty(3 * pages.dim if votes else 0, np.float64)
    # The request whose victims are chosen, but not overwritten yet, and its heads.
    before, waiting, waiting_to = _evicting(writes, 0), np.int64(0), np.int64(0)
    stop, item = np.int64(0), np.int64(0)
    while stop < len(rows):
        start = stop
        while stop < len(rows) and requests[stop] == requests[start]:
            stop += 1
        low, high = max(first - item, 0), min(last - item, heads)
        item += heads
        token = _evicting(writes, start)
        for head in range(low, high):
            if not writes.evict[start]:
                append_tokens(
                    pages,
                    rule,
                    tokens,
                    rows[start:stop],
                    writes.positions[start:stop],
                    writes.slots[start:stop],
                    token.blocks,
                    head,
                    lanes,
                    scratch,
                    frame,
                )
                continue
            look_ahead(pages, rule, token, head)
            victim = chosen.victims[waiting] if waiting < waiting_to else np.int64(0)
            if waiting < waiting_to:
                prefetch_slot(pages, before.blocks, victim, waiting)
            describe_new(pages, rule, tokens, token, head, scratch, chosen)
            if waiting < waiting_to:
                copy_in(pages, tokens, before.row, before.blocks, victim, waiting)
                waiting += 1
        if low >= high or not writes.evict[start]:
            continue
        # Two requests may differ in how many of their heads are this thread's.
        overwrite(pages, tokens, before, chosen.victims, waiting, waiting_to)
        choose_victims(pages, rule, token, low, high, scratch, chosen)
        before, waiting, waiting_to = token, np.int64(low), np.int64(high)
    overwrite(pages, tokens, before, chosen.victims, waiting, waiting_to)
    hold(own_scratch, own_chosen)
