"""What a step launches; all of it works in place.

Nothing here allocates what a step would have to wait for, or reads a tensor on the
host. Arguments are the groups of `hashevict_vllm.kernels.triton.arguments`; ``bound``
is the most slots that any request of the batch may use, which the host knows. These
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
    Signed,
    Sizes,
    Step,
    Tokens,
)
from hashevict_vllm.kernels.triton.describe import describe_kernel
from hashevict_vllm.kernels.triton.frame import frame_kernel
from hashevict_vllm.kernels.triton.pieces import NAMES
from hashevict_vllm.kernels.triton.plan import plan_kernel
from hashevict_vllm.kernels.triton.reduce import compact, frames, mark, projections
from hashevict_vllm.kernels.triton.rule import DeviceRule
from hashevict_vllm.kernels.triton.sign import sign_kernel
from hashevict_vllm.kernels.triton.write import write_kernel

__all__ = ["compact", "describe", "mark", "plan", "sign", "write"]

NUM_COLUMNS = len(NAMES)


def plan(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    prompt_lens: Tensor,
    done: Tensor,
    pieces: Tensor,
    live: Tensor,
    token_piece: Tensor,
    rule: DeviceRule,
    first_round: bool,
) -> None:
    """The next piece of every request; arguments as `plan_kernel`.

    Args:
        query_start_loc: int32 [P + 1].
        seq_lens: int32 [P].
        prompt_lens: int32 [P].
        done: int32 [P].
        pieces: int32 [P, columns].
        live: int32 [P].
        token_piece: int32 [T], T at least the tokens of the step; -1 beyond them.
        rule: What kernels are compiled for.
        first_round: Whether the step begins.

    """
    if first_round:
        token_piece.fill_(-1)
    plan_kernel[(seq_lens.shape[0],)](
        query_start_loc,
        seq_lens,
        prompt_lens,
        done,
        pieces,
        live,
        token_piece,
        rule=rule,
        FIRST_ROUND=first_round,
        TILE=launch.PLAN_TILE,
        num_warps=4,
    )


def sign(tokens: Tokens, projection: Tensor, signed: Signed, rule: DeviceRule) -> None:
    """Signatures and squared norms of queries and keys.

    Args:
        tokens: Of the step; the values are not read.
        projection: float32 [D, b].
        signed: Written.
        rule: What kernels are compiled for.

    """
    num_tokens, num_heads, head_dim = tokens.k.shape
    group = tokens.q.shape[1] // num_heads
    if num_tokens == 0:
        return
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
    estimate: Estimate,
    slots: Tensor,
    rule: DeviceRule,
    bound: int,
    scans: bool,
) -> None:
    """Write tokens into their slots, evicting where full; arguments as `write_kernel`.

    Args:
        tokens: Of the step.
        signed: From `sign`.
        step: What the round does.
        page: Written.
        estimate: Read by rules that vote.
        slots: int32 [T, Hkv], written by rules that vote, for `describe`.
        rule: What kernels are compiled for.
        bound: See the module.
        scans: Whether any piece of the round may evict or vote.

    """
    num_tokens, num_heads, _ = tokens.k.shape
    group = tokens.q.shape[1] // num_heads
    if num_tokens == 0:
        return
    tile = launch.scan_tile(bound)
    if rule.votes:
        tile = launch.vote_tile(group, bound)
    sizes = Sizes.of(rule, page, group)
    write_kernel[(num_tokens, num_heads)](
        tokens,
        signed,
        step,
        page,
        estimate,
        projections(rule, step, sizes.members),
        frames(rule, step, page),
        slots,
        rule=rule,
        sizes=sizes,
        STEP=launch.SIGN_STEP,
        TILE=tile,
        SCANS=scans,
        **(launch.SCAN_OPTIONS if scans else launch.COPY_OPTIONS),
    )


def describe(
    step: Step, page: Page, projection: Tensor, slots: Tensor, rule: DeviceRule
) -> None:
    """Signatures and numbers of the keys just written, for rules that vote.

    Args:
        step: As `write`.
        page: As `write`.
        projection: float32 [D, b].
        slots: int32 [T, Hkv], from `write`.
        rule: What kernels are compiled for.

    """
    num_tokens, num_heads = slots.shape
    if num_tokens == 0:
        return
    num_pieces = step.pieces.shape[0]
    scratch, sizes = frames(rule, step, page), Sizes.of(rule, page, 1)
    if rule.sinks:
        frame_kernel[(num_pieces, num_heads)](
            scratch, step, page, rule=rule, sizes=sizes, **launch.FRAME_OPTIONS
        )
    tokens = launch.describe_tokens(num_tokens)
    programs = triton.cdiv(num_tokens, tokens)
    of_sinks = num_pieces * triton.cdiv(rule.sinks, tokens)
    describe_kernel[(programs + of_sinks, num_heads)](
        step,
        page,
        projection,
        scratch,
        slots,
        num_tokens,
        programs,
        rule=rule,
        sizes=sizes,
        COLUMNS=max(launch.padded(rule.bits), 32),
        TOKENS=tokens,
        STEP=launch.SIGN_STEP,
        **launch.DESCRIBE_OPTIONS,
    )
