"""Plans a round on the device: what `hashevict_vllm.plan` does on the host.

How many slots a request uses follows from token counts alone, so a handful of integers
per request suffice, and no length has to come to the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hashevict_vllm.kernels.codes import PROMPT_ENDS, PROMPT_GOES_ON
from hashevict_vllm.kernels.triton.pieces import (
    BALLOTS,
    BUDGET,
    COMPACT,
    COUNT,
    EVICT,
    FIRST_VOTER,
    LIVE,
    NUM_COLUMNS,
    RECENT,
    REQUEST,
    ROW,
    SLOT,
    START,
)

_PROMPT_ENDS = tl.constexpr(PROMPT_ENDS)
_PROMPT_GOES_ON = tl.constexpr(PROMPT_GOES_ON)


@triton.jit
def _occupied_slots(tokens, prompt, budget, rule: tl.constexpr):
    """Slots in use, live and open scratch, after ``tokens`` tokens."""
    settled = tl.minimum(tokens, budget)
    if rule.segment == 1:
        return settled
    complete = tokens // rule.segment * rule.segment
    open_slots = tl.minimum(complete, budget) + tokens - complete
    return tl.where((tokens <= budget) | (tokens >= prompt), settled, open_slots)


@triton.jit
def _first_voter(start, stop, prompt, budget, rule: tl.constexpr):
    """First voter of a piece, ``stop`` if none votes (`ResolvedKVPolicy.voters`)."""
    if rule.window == 0:
        return stop
    every, horizon = rule.every, budget - rule.horizon
    first = tl.maximum(start, max(rule.sinks, 1))
    decode = tl.maximum(first, horizon)
    decode = tl.minimum((decode + every - 1) // every * every, stop)
    if rule.segment == 1:
        return decode
    begin = (stop - 1) // rule.segment * rule.segment
    end = tl.minimum(begin + rule.segment, prompt)
    full = tl.where(end == prompt, horizon, budget)
    first = tl.maximum(tl.maximum(first, begin), end - rule.window)
    first = tl.where(end > full, tl.minimum(first, stop), stop)
    return tl.where(start >= prompt, decode, first)


@triton.jit
def plan_kernel(
    query_start_loc,
    seq_lens,
    prompt_lens,
    budgets,
    recents,
    done,
    pieces,
    live,
    token_piece,
    slot_mapping,
    rule: tl.constexpr,
    FIRST_ROUND: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: the next piece of one request.

    Args:
        query_start_loc: int32 [P + 1], first row of each request in the step's q, k, v.
        seq_lens: int32 [P], tokens after the step; as vLLM counts, absolute.
        prompt_lens: int32 [P], lengths of the original prompts.
        budgets: int32 [P], C of each request.
        recents: int32 [P], the most recent tokens that each protects.
        done: int32 [P], position that the piece before ended at; read except in the
            first round, written.
        pieces: int32 [P, columns], written, see `pieces`.
        live: int32 [P], written: slots that the round attends to, 0 for no piece.
        token_piece: int32 [T], written in the first round; not where nothing is
            scheduled.
        slot_mapping: int64 [T], negative for tokens that vLLM has made up: nothing is
            done for requests that begin with one, as their row of the block table may
            be another's; they attend to as many slots as they say. None for none.
        rule: `DeviceRule`.
        FIRST_ROUND: Whether the step begins.
        TILE: Tokens per step of filling ``token_piece``.

    """
    request = tl.program_id(0)
    row = tl.load(query_start_loc + request)
    last_row = tl.load(query_start_loc + request + 1)
    end, prompt = tl.load(seq_lens + request), tl.load(prompt_lens + request)
    begin = end - (last_row - row)
    real = row >= 0
    if slot_mapping is not None:
        real = tl.load(slot_mapping + row, mask=row < last_row, other=0) >= 0
    if FIRST_ROUND:
        start = begin
        filled = tl.where(real, last_row, row)
        for first in range(row, filled, TILE):
            tokens = first + tl.arange(0, TILE)
            tl.store(token_piece + tokens, request, mask=tokens < filled)
    else:
        start = tl.load(done + request)
    budget, segment = tl.load(budgets + request), rule.segment
    slot = _occupied_slots(start, prompt, budget, rule)
    reading = (start < prompt) & (segment > 1)
    boundary = (start // segment + 1) * segment
    # No reduction happens before the first boundary past the budget.
    whole = (budget + segment - 1) // segment * segment
    boundary = tl.minimum(tl.where(boundary <= budget, whole, boundary), prompt)
    evict = (reading == 0) & (start >= budget)
    stop = tl.where(reading, boundary, tl.where(evict, start + 1, budget))
    stop = tl.minimum(stop, end)
    count = tl.maximum(stop - start, 0)
    compact = reading & (stop == boundary) & (slot + count > budget) & (count > 0)
    voter = _first_voter(start, stop, prompt, budget, rule)
    after = tl.where(count == 0, 0, tl.where(evict, slot, slot + count))
    tl.store(live + request, after)
    tl.store(done + request, start + count)
    count = tl.where(real, count, 0)
    evict, compact = evict & real, compact & real
    piece = pieces + request * NUM_COLUMNS
    tl.store(piece + REQUEST, request)
    tl.store(piece + START, start)
    tl.store(piece + COUNT, count)
    tl.store(piece + ROW, row + start - begin)
    tl.store(piece + SLOT, slot)
    tl.store(piece + BUDGET, budget)
    tl.store(piece + RECENT, tl.load(recents + request))
    tl.store(piece + EVICT, (evict & (count > 0)).to(tl.int32))
    why = tl.where(stop < prompt, _PROMPT_GOES_ON, _PROMPT_ENDS)
    tl.store(piece + COMPACT, tl.where(compact, why, 0))
    tl.store(piece + FIRST_VOTER, tl.where(count == 0, 0, voter - start))
    tl.store(piece + BALLOTS, tl.where(reading | (count == 0), 0, rule.every))
    tl.store(piece + LIVE, after)
