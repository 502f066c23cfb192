"""The replay that reduces a prompt's segment to the budget (numba).

Design 1.3: victims are marked ``~position`` and stay in place, as later tokens of the
open segment still attend to them; a complete segment is compacted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from hashevict_vllm.kernels.codes import (
    HAMMING_TO_KEY,
    HAMMING_TO_QUERY,
    PROMPT_GOES_ON,
    VOTE,
)
from hashevict_vllm.kernels.cpu.evict import new_chosen
from hashevict_vllm.kernels.cpu.frame import (
    adjacent_keys,
    describe_missing,
    frame_of,
)
from hashevict_vllm.kernels.cpu.hamming import merge
from hashevict_vllm.kernels.cpu.jit import inlined
from hashevict_vllm.kernels.cpu.layer import new_scratch
from hashevict_vllm.kernels.cpu.scores import find_victim, merge_queries
from hashevict_vllm.kernels.cpu.slots import elements_of, row_size, word_of
from hashevict_vllm.kernels.cpu.votes import cast_votes, mark_losers


class Piece(NamedTuple):
    """A run of prompt tokens, or of decoding ones that vote; a row of ``pieces``.

    Attributes:
        request: Row of the block table.
        start: Position of its first token.
        length: Tokens.
        row: Of q, k and v, of its first token.
        slot: Where that lies.
        budget: C of its request.
        recent: The most recent tokens that its request protects (`plan.Piece`).
        compact: Whether the live set is reduced afterwards (`PROMPT_ENDS`,
            `PROMPT_GOES_ON`).
        first_voter: Number of the first token that votes, ``length`` if none does.
        vote_every: Distance of voting tokens; 0 in a segment, where all that follow
            the first vote.

    """

    request: np.int64
    start: np.int64
    length: np.int64
    row: np.int64
    slot: np.int64
    budget: np.int64
    recent: np.int64
    compact: np.int64
    first_voter: np.int64
    vote_every: np.int64


@njit
def _piece_of(row):
    """`Piece` of int32 [10]."""
    return Piece(
        np.int64(row[0]),
        np.int64(row[1]),
        np.int64(row[2]),
        np.int64(row[3]),
        np.int64(row[4]),
        np.int64(row[5]),
        np.int64(row[6]),
        np.int64(row[7]),
        np.int64(row[8]),
        np.int64(row[9]),
    )


@njit
def _vote(pages, rule, tokens, piece, blocks, head, lanes, scratch, frame):
    """Cast the votes of a piece, and mark who loses if it is the segment's last.

    A token that evicted (``slot`` is the budget) votes on the others among the live
    slots.
    """
    end = piece.slot + piece.length
    if piece.first_voter < piece.length:
        frame_of(pages, blocks, head, lanes, rule.sinks, scratch.x, frame)
        # Beyond the budget the token itself has taken a slot below.
        there = min(end, piece.budget) if piece.vote_every else end
        describe_missing(pages, rule, blocks, there, head, frame, scratch)
    for i in range(piece.first_voter, piece.length, max(piece.vote_every, 1)):
        t = piece.start + i if piece.vote_every else -1
        row, num_slots = piece.row + i, piece.slot + i
        cast_votes(pages, rule, tokens, row, blocks, num_slots, head, frame, t)
    if piece.compact:
        stop = piece.start + piece.length
        budget, recent = piece.budget, piece.recent
        goes_on = piece.compact == PROMPT_GOES_ON
        mark_losers(pages, rule, blocks, end, head, stop, goes_on, budget, recent)


@inlined
def _replay_head(pages, rule, tokens, piece, blocks, head, scratch, chosen):
    """Mark, for one (piece, KV head), the victims of the tokens beyond the budget."""
    words, size, sources = pages.words, row_size(pages), scratch.sources
    merged, scores, best = chosen.merged, scratch.scores, chosen.best
    for i in range(max(piece.budget - piece.slot, 0), piece.length):
        slot, t = piece.slot + i, piece.start + i
        if rule.score == HAMMING_TO_QUERY:
            row = piece.row + i
            merge_queries(pages, rule, tokens, row, head, scratch, merged[head])
        elif rule.score == HAMMING_TO_KEY:
            at = word_of(pages, blocks, slot, head)
            for w in range(words):
                sources[0, w] = pages.tail[at + w * size]
            merge(sources, merged[head])
        victim = find_victim(
            pages,
            rule,
            blocks,
            slot,
            head,
            t,
            piece.recent,
            merged,
            scores,
            best,
        )
        if victim < 0:
            raise RuntimeError("no slot may be evicted")
        at = word_of(pages, blocks, victim, head) + words * size
        pages.tail[at] = ~pages.tail[at]


@inlined
def _compact_head(pages, blocks, head, budget, end):
    """Move survivors in slots [budget, end) into the marked slots, in slot order."""
    tail, block_size, dim = pages.tail, pages.block_size, pages.dim
    row, size = row_size(pages), 2 * block_size * dim
    last = pages.words * row
    hole = np.int64(-1)
    for slot in range(budget, end):
        source_meta = word_of(pages, blocks, slot, head)
        if tail[source_meta + last] < 0:
            continue
        position = np.int32(0)
        while position >= 0:
            hole += 1
            if hole >= budget:
                raise RuntimeError("more slots survive than there is room for")
            target_meta = word_of(pages, blocks, hole, head)
            position = tail[target_meta + last]
        for w in range(pages.words + 1):
            tail[target_meta + w * row] = tail[source_meta + w * row]
        at = elements_of(pages, blocks, slot, head)
        source = pages.elements[at : at + size]
        at = elements_of(pages, blocks, hole, head)
        target = pages.elements[at : at + size]
        here, there = slot % block_size, hole % block_size
        for d in range(dim):
            target[pages.k_map[there, d]] = source[pages.k_map[here, d]]
            target[pages.v_map[there, d]] = source[pages.v_map[here, d]]


@njit
def replay_items(pages, rule, tokens, pieces, block_table, first, last):
    """Reduce items [first, last): piece by piece, head by head.

    ``pieces`` int32 [n, 10], rows as `Piece`; ``block_table`` int32 [R, max blocks].
    """
    scratch = new_scratch(pages, rule, tokens)
    chosen = new_chosen(pages, scratch)
    votes = rule.score == VOTE
    lanes = adjacent_keys(pages.k_map, rule.sinks if votes else 0)
    frame = np.empty(3 * pages.dim if votes else 0, np.float64)
    for item in range(first, last):
        piece, head = _piece_of(pieces[item // pages.heads]), item % pages.heads
        blocks = block_table[piece.request]
        if votes:
            _vote(pages, rule, tokens, piece, blocks, head, lanes, scratch, frame)
        else:
            _replay_head(pages, rule, tokens, piece, blocks, head, scratch, chosen)
        if piece.compact:
            end = piece.slot + piece.length
            _compact_head(pages, blocks, head, piece.budget, end)
