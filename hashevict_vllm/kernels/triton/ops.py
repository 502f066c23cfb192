"""What a step launches; all of it works in place.

Nothing here allocates what a step would have to wait for, or reads a tensor on the
host. Arguments are the groups of `hashevict_vllm.kernels.triton.arguments`. These
are plain functions: vLLM calls attention behind an operator of its own, which the
compiler does not look into, so another one around each launch would only cost time.
"""

from __future__ import annotations

import triton
from torch import Tensor

from hashevict_vllm.kernels.triton import launch
from hashevict_vllm.kernels.triton.arguments import (
    Estimate,
    Page,
    Scratch,
    Signed,
    Sizes,
    Step,
    Tokens,
)
from hashevict_vllm.kernels.triton.describe import describe_kernel
from hashevict_vllm.kernels.triton.pieces import NAMES
from hashevict_vllm.kernels.triton.plan import plan_kernel
from hashevict_vllm.kernels.triton.reduce import compact, frames, mark
from hashevict_vllm.kernels.triton.rule import DeviceRule
from hashevict_vllm.kernels.triton.sign import sign_kernel
from hashevict_vllm.kernels.triton.votes import ballot_kernel
from hashevict_vllm.kernels.triton.write import write_kernel

__all__ = ["ballot", "compact", "describe", "mark", "plan", "sign", "write"]

NUM_COLUMNS = len(NAMES)


def plan(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    prompt_lens: Tensor,
    budgets: Tensor,
    recents: Tensor,
    done: Tensor,
    pieces: Tensor,
    live: Tensor,
    token_piece: Tensor,
    rule: DeviceRule,
    first_round: bool,
    slot_mapping: Tensor | None = None,
) -> None:
    """The next piece of every request; arguments as `plan_kernel`.

    Args:
        query_start_loc: int32 [P + 1].
        seq_lens: int32 [P].
        prompt_lens: int32 [P].
        budgets: int32 [P].
        recents: int32 [P].
        done: int32 [P].
        pieces: int32 [P, columns].
        live: int32 [P].
        token_piece: int32 [T], T at least the tokens of the step; -1 beyond them.
        rule: What kernels are compiled for.
        first_round: Whether the step begins.
        slot_mapping: int64 [T], vLLM's; None if no request is made up.

    """
    if first_round:
        token_piece.fill_(-1)
    plan_kernel[(seq_lens.shape[0],)](
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
        rule=rule,
        FIRST_ROUND=first_round,
        TILE=launch.PLAN_TILE,
        num_warps=4,
    )


def sign(
    tokens: Tokens,
    projection: Tensor,
    signed: Signed,
    rule: DeviceRule,
    at_once: int | None = None,
) -> None:
    """Signatures and squared norms of queries and keys.

    Args:
        tokens: Of the step; the values are not read.
        projection: float32 [D, b].
        signed: Written.
        rule: What kernels are compiled for.
        at_once: Tokens of a program, a power of two; by default one of
            `launch.sign_tokens`.

    """
    num_tokens, num_heads, head_dim = tokens.k.shape
    group = tokens.q.shape[1] // num_heads
    if num_tokens == 0:
        return
    if at_once is None:
        at_once = launch.sign_tokens(num_tokens, group)
    sign_kernel[(triton.cdiv(num_tokens, at_once), num_heads)](
        tokens,
        projection,
        signed,
        num_tokens,
        num_heads,
        rule=rule,
        GROUP=group,
        MEMBERS=launch.padded(group + 1),
        TOKENS=at_once,
        DIM=head_dim,
        WORDS=rule.hashed,
        STEP=launch.SIGN_STEP,
        num_warps=4,
    )


def write(
    tokens: Tokens,
    signed: Signed,
    step: Step,
    page: Page,
    rule: DeviceRule,
    scans: bool,
    rows: Tensor | None = None,
    queries: Tensor | None = None,
) -> None:
    """Write tokens into their slots, evicting where full; arguments as `write_kernel`.

    Args:
        tokens: Of the step.
        signed: From `sign`.
        step: What the round does; without ``token_piece`` one token of every piece.
        page: Written.
        rule: What kernels are compiled for.
        scans: Whether tokens may evict. If not, those that do are left alone.
        rows: int32 [n], tokens that are written; None for all.
        queries: [T, Hq, D], written for tokens that vote; None where nobody asks.

    """
    num_tokens, num_heads = len(tokens.k if rows is None else rows), step.heads
    if step.token_piece is None:
        num_tokens = len(step.pieces)
    if num_tokens == 0:
        return
    options = launch.scan_options(rule.budget) if scans else launch.COPY_OPTIONS
    write_kernel[(num_tokens, num_heads)](
        tokens,
        signed,
        step,
        page,
        rows,
        queries if scans else None,
        rule=rule,
        sizes=Sizes.of(rule, page, tokens.q.shape[1] // num_heads),
        TILE=launch.write_tile(rule.budget),
        SCANS=scans,
        **options,
    )


def describe(step: Step, page: Page, projection: Tensor, rule: DeviceRule) -> None:
    """Signatures and numbers of a prompt's keys just written, for rules that vote.

    Args:
        step: As `write`.
        page: As `write`.
        projection: float32 [D, b].
        rule: What kernels are compiled for.

    """
    num_tokens, num_heads = len(step.token_piece), step.heads
    if num_tokens == 0:
        return
    num_pieces = step.pieces.shape[0]
    sizes = Sizes.of(rule, page, 1)
    scratch = frames(rule, step, page, sizes)
    tokens = launch.DESCRIBE_TOKENS
    programs = triton.cdiv(num_tokens, tokens)
    of_sinks = num_pieces * triton.cdiv(rule.sinks, tokens)
    describe_kernel[(programs + of_sinks, num_heads)](
        step,
        page,
        projection,
        scratch,
        num_tokens,
        programs,
        rule=rule,
        sizes=sizes,
        COLUMNS=launch.columns(rule.bits),
        TOKENS=tokens,
        STEP=launch.SIGN_STEP,
        **launch.DESCRIBE_OPTIONS,
    )


def ballot(
    tokens: Tokens,
    step: Step,
    page: Page,
    estimate: Estimate,
    scratch: Scratch,
    rule: DeviceRule,
) -> None:
    """Let tokens that decode vote, after `write` and before the layer's next `write`.

    It touches nothing that attention reads or writes, so it may run beside it.

    Args:
        tokens: Of the step; queries are read.
        step: What the round does.
        page: Signatures, numbers and votes are written, keys read.
        estimate: How attention is guessed.
        scratch: Not used by any other launch at the time.
        rule: What kernels are compiled for.

    """
    jobs = step.pieces.shape[0] * step.heads
    programs = min(jobs, len(scratch.frames))
    if programs == 0:
        return
    sizes = Sizes.of(rule, page, tokens.q.shape[1] // step.heads)
    ballot_kernel[(programs,)](
        tokens,
        step,
        page,
        estimate,
        scratch,
        jobs,
        rule=rule,
        sizes=sizes,
        COLUMNS=launch.columns(rule.bits),
        STEP=launch.SIGN_STEP,
        TILE=launch.vote_tile(sizes.group, rule.budget),
        **launch.BALLOT_OPTIONS,
    )
