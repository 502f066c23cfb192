"""The kernels as operators of PyTorch: ``torch.ops.hashevict.*``, all in place.

They allocate nothing that a step would have to wait for and read no tensor on the host.
``rule`` is a `hashevict_vllm.kernels.triton.rule.DeviceRule`, as a list; ``bound`` is
the most slots that any request of the batch may use, which the host knows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from hashevict_vllm.kernels.triton import launch
from hashevict_vllm.kernels.triton.compact import move_kernel, pair_kernel
from hashevict_vllm.kernels.triton.describe import describe_kernel
from hashevict_vllm.kernels.triton.mark import (
    pool_kernel,
    replay_kernel,
    select_kernel,
)
from hashevict_vllm.kernels.triton.pieces import NAMES
from hashevict_vllm.kernels.triton.plan import plan_kernel
from hashevict_vllm.kernels.triton.rule import DeviceRule
from hashevict_vllm.kernels.triton.sign import sign_kernel
from hashevict_vllm.kernels.triton.votes import vote_kernel
from hashevict_vllm.kernels.triton.write import write_kernel
from hashevict_vllm.policies.vote import AHEAD, SMOOTH

NUM_COLUMNS = len(NAMES)


def _projections(
    rule: DeviceRule, pieces: Tensor, num_heads: int, members: int
) -> Tensor:
    """Scratch for projected queries, where a rule votes: float32 [P, Hkv, b, G']."""
    shape = (pieces.shape[0] if rule.votes else 0, num_heads, rule.bits, members)
    return torch.empty(shape, dtype=torch.float32, device=pieces.device)


@torch.library.custom_op(
    "hashevict::plan", mutates_args=("done", "pieces", "live", "token_piece")
)
def plan(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    prompt_lens: Tensor,
    done: Tensor,
    pieces: Tensor,
    live: Tensor,
    token_piece: Tensor,
    rule: Sequence[int],
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
        rule: See the module.
        first_round: Whether the step begins.

    """
    r = DeviceRule(*rule)
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
        FIRST_ROUND=first_round,
        BUDGET=r.budget,
        SEGMENT=r.segment,
        SINKS=r.sinks,
        WINDOW=r.window,
        EVERY=r.every,
        HORIZON=r.horizon,
        TILE=launch.PLAN_TILE,
        num_warps=4,
    )


@torch.library.custom_op("hashevict::sign", mutates_args=("signatures", "squares"))
def sign(
    q: Tensor,
    k: Tensor,
    projection: Tensor,
    signatures: Tensor,
    squares: Tensor,
    rule: Sequence[int],
) -> None:
    """Signatures and squared norms of queries and keys; arguments as `sign_kernel`.

    Args:
        q: [T, Hq, D], any float dtype.
        k: [T, Hkv, D], likewise.
        projection: float32 [D, b].
        signatures: int32 [T, Hkv, G + 1, W].
        squares: float32 [T, Hkv, G + 1].
        rule: See the module.

    """
    r = DeviceRule(*rule)
    num_tokens, num_heads, head_dim = k.shape
    group = q.shape[1] // num_heads
    launch.check_rows(q=q, k=k)
    if num_tokens == 0:
        return
    tokens = launch.sign_tokens(num_tokens, group)
    sign_kernel[(triton.cdiv(num_tokens, tokens), num_heads)](
        q,
        k,
        projection,
        signatures,
        squares,
        num_tokens,
        num_heads,
        *q.stride()[:2],
        *k.stride()[:2],
        GROUP=group,
        MEMBERS=launch.padded(group + 1),
        TOKENS=tokens,
        DIM=head_dim,
        BITS=r.bits,
        WORDS=r.hashed,
        STEP=launch.SIGN_STEP,
        num_warps=4,
    )


@torch.library.custom_op(
    "hashevict::write", mutates_args=("k_cache", "v_cache", "tail", "slots")
)
def write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    signatures: Tensor,
    squares: Tensor,
    pieces: Tensor,
    token_piece: Tensor,
    block_table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tail: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    projection: Tensor,
    slots: Tensor,
    factor: float,
    decay: float,
    rule: Sequence[int],
    bound: int,
    scans: bool,
) -> None:
    """Write tokens into their slots, evicting where full; arguments as `write_kernel`.

    Args:
        q: [T, Hq, D].
        k: [T, Hkv, D].
        v: [T, Hkv, D].
        signatures: int32 [T, Hkv, G + 1, W], from `sign`.
        squares: float32 [T, Hkv, G + 1], likewise.
        pieces: int32 [P, columns].
        token_piece: int32 [T].
        block_table: int32 [R, max blocks].
        k_cache: [B, Hkv, N, D].
        v_cache: [B, Hkv, N, D].
        tail: int32 [B, Hkv, W + 1, N].
        k_scale: float32 [1] for an fp8 cache, else None.
        v_scale: Likewise.
        projection: float32 [D, b].
        slots: int32 [T, Hkv], written by rules that vote, for `describe`.
        factor: Softmax scale times `hashevict_vllm.policies.vote.estimate_scale`.
        decay: Factor on earlier votes.
        rule: See the module.
        bound: See the module.
        scans: Whether any piece of the round may evict or vote.

    """
    r = DeviceRule(*rule)
    num_tokens, num_heads, head_dim = k.shape
    launch.check_rows(q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, tail=tail)
    group = q.shape[1] // num_heads
    if num_tokens == 0:
        return
    tile = launch.scan_tile(bound)
    if r.votes:
        tile = launch.vote_tile(group, bound)
    members = launch.padded(group)
    write_kernel[(num_tokens, num_heads)](
        q,
        k,
        v,
        signatures,
        squares,
        pieces,
        token_piece,
        block_table,
        k_cache,
        v_cache,
        tail,
        k_scale,
        v_scale,
        projection,
        _projections(r, pieces, num_heads, members),
        slots,
        factor,
        r.bits,
        head_dim,
        decay,
        num_heads,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        block_table.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *tail.stride()[:3],
        KIND=r.kind,
        WORDS=r.words,
        HASHED=r.hashed,
        BITS=r.bits,
        GROUP=group,
        MEMBERS=members,
        SALT=r.salt,
        EVERY=r.every,
        STEP=launch.SIGN_STEP,
        SINKS=r.sinks,
        RECENT=r.recent,
        DIM=head_dim,
        DIM_PADDED=launch.padded(head_dim),
        N=tail.shape[3],
        TILE=tile,
        SCANS=scans,
        **(launch.SCAN_OPTIONS if scans else launch.COPY_OPTIONS),
    )


@torch.library.custom_op("hashevict::describe", mutates_args=("tail",))
def describe(
    pieces: Tensor,
    token_piece: Tensor,
    slots: Tensor,
    block_table: Tensor,
    k_cache: Tensor,
    k_scale: Tensor | None,
    tail: Tensor,
    projection: Tensor,
    rule: Sequence[int],
) -> None:
    """Signatures and norms of the keys just written, for rules that vote.

    Args:
        pieces: As `write`.
        token_piece: As `write`.
        slots: int32 [T, Hkv], from `write`.
        block_table: As `write`.
        k_cache: As `write`.
        k_scale: As `write`.
        tail: As `write`.
        projection: As `write`.
        rule: See the module.

    """
    r = DeviceRule(*rule)
    num_tokens, num_heads = slots.shape
    launch.check_rows(k_cache=k_cache, tail=tail)
    if num_tokens == 0:
        return
    tokens = launch.describe_tokens(num_tokens, r.sinks)
    programs = triton.cdiv(num_tokens, tokens)
    describe_kernel[(programs + (pieces.shape[0] if r.sinks else 0), num_heads)](
        projection,
        pieces,
        token_piece,
        slots,
        block_table,
        k_cache,
        k_scale,
        tail,
        num_tokens,
        programs,
        num_heads,
        block_table.stride(0),
        *k_cache.stride()[:3],
        *tail.stride()[:3],
        SINKS=r.sinks,
        WORDS=r.words,
        DIM=k_cache.shape[3],
        BITS=r.bits,
        COLUMNS=max(launch.padded(r.bits), 32),
        TOKENS=tokens,
        STEP=launch.SIGN_STEP,
        N=tail.shape[3],
        num_warps=4,
    )


@torch.library.custom_op("hashevict::mark", mutates_args=("tail",))
def mark(
    q: Tensor,
    signatures: Tensor,
    pieces: Tensor,
    block_table: Tensor,
    tail: Tensor,
    projection: Tensor,
    factor: float,
    decay: float,
    rule: Sequence[int],
    bound: int,
) -> None:
    """Mark the losers of every piece, by replay or by votes.

    Args:
        q: As `write`.
        signatures: As `write`.
        pieces: int32 [P, columns], the pieces that overflow the budget or vote.
        block_table: As `write`.
        tail: As `write`.
        projection: As `write`.
        factor: As `write`.
        decay: As `write`.
        rule: See the module.
        bound: See the module.

    """
    r = DeviceRule(*rule)
    num_pieces, num_heads = pieces.shape[0], tail.shape[1]
    group = q.shape[1] // num_heads
    launch.check_rows(q=q, tail=tail)
    if num_pieces == 0:
        return
    grid = (num_pieces, num_heads)
    strides = (block_table.stride(0), *tail.stride()[:3])
    tile = launch.scan_tile(bound)
    if not r.votes:
        replay_kernel[grid](
            signatures,
            pieces,
            block_table,
            tail,
            num_heads,
            *strides,
            KIND=r.kind,
            WORDS=r.words,
            GROUP=group,
            SALT=r.salt,
            SINKS=r.sinks,
            RECENT=r.recent,
            BUDGET=r.budget,
            HASHED=r.hashed,
            N=tail.shape[3],
            TILE=tile,
            **launch.SCAN_OPTIONS,
        )
        return
    members = launch.padded(group)
    vote_kernel[grid](
        q,
        projection,
        _projections(r, pieces, num_heads, members),
        pieces,
        block_table,
        tail,
        factor,
        r.bits,
        q.shape[2],
        decay,
        num_heads,
        *q.stride()[:2],
        *strides,
        WORDS=r.words,
        DIM=q.shape[2],
        BITS=r.bits,
        GROUP=group,
        MEMBERS=members,
        EVERY=r.every,
        STEP=launch.SIGN_STEP,
        N=tail.shape[3],
        TILE=launch.vote_tile(group, bound),
        **launch.SCAN_OPTIONS,
    )
    shape = (num_pieces, num_heads, bound)
    pooled, smooth = (
        torch.empty(shape, dtype=torch.float32, device=tail.device) for _ in range(2)
    )
    # Which neighbours count (policies/vote.py); without pooling a slot is its own.
    reach = (0, 0) if r.pool == 1 else (SMOOTH, SMOOTH)
    stages = [(smooth if r.pool > 1 else pooled, *reach, True)]
    if r.pool > 1:
        stages.append((pooled, r.pool - AHEAD - 1, AHEAD, False))
    for target, before, ahead, smooths in stages:
        pool_kernel[(*grid, triton.cdiv(bound, launch.POOL_TILE))](
            pieces,
            block_table,
            tail,
            smooth,
            target,
            num_heads,
            bound,
            *strides,
            WORDS=r.words,
            BEFORE=before,
            AHEAD=ahead,
            SMOOTHS=smooths,
            N=tail.shape[3],
            TILE=launch.POOL_TILE,
            NEIGHBOURS=launch.POOL_NEIGHBOURS,
            num_warps=4,
        )
    select_kernel[grid](
        pieces,
        block_table,
        tail,
        pooled,
        num_heads,
        bound,
        *strides,
        WORDS=r.words,
        SINKS=r.sinks,
        RECENT=r.recent,
        BUDGET=r.budget,
        N=tail.shape[3],
        TILE=tile,
        **launch.SCAN_OPTIONS,
    )


@torch.library.custom_op(
    "hashevict::compact", mutates_args=("k_cache", "v_cache", "tail")
)
def compact(
    pieces: Tensor,
    block_table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tail: Tensor,
    rule: Sequence[int],
    bound: int,
) -> None:
    """Move the survivors of complete segments into the marked slots.

    Args:
        pieces: int32 [P, columns]; those that are not compacted are left alone.
        block_table: As `write`.
        k_cache: As `write`.
        v_cache: As `write`.
        tail: As `write`.
        rule: See the module.
        bound: See the module.

    """
    r = DeviceRule(*rule)
    num_pieces, num_heads = pieces.shape[0], tail.shape[1]
    launch.check_rows(k_cache=k_cache, v_cache=v_cache, tail=tail)
    width = min(r.budget, bound - r.budget)
    if num_pieces == 0 or width <= 0:
        return
    head_dim, device = k_cache.shape[3], tail.device
    moves = torch.empty(
        (num_pieces, num_heads, width, 2), dtype=torch.int32, device=device
    )
    num_moves = torch.empty((num_pieces, num_heads), dtype=torch.int32, device=device)
    pair_kernel[(num_pieces, num_heads)](
        pieces,
        block_table,
        tail,
        moves,
        num_moves,
        num_heads,
        width,
        block_table.stride(0),
        *tail.stride()[:3],
        WORDS=r.words,
        BUDGET=r.budget,
        N=tail.shape[3],
        TILE=launch.scan_tile(bound),
        **launch.SCAN_OPTIONS,
    )
    rows = launch.move_rows(head_dim)
    move_kernel[(num_pieces, num_heads, triton.cdiv(width, rows))](
        pieces,
        block_table,
        launch.as_integers(k_cache),
        launch.as_integers(v_cache),
        tail,
        moves,
        num_moves,
        num_heads,
        width,
        block_table.stride(0),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *tail.stride()[:3],
        WORDS=r.words,
        DIM=head_dim,
        DIM_PADDED=launch.padded(head_dim),
        N=tail.shape[3],
        ROWS=rows,
        num_warps=4,
    )


@plan.register_fake
@describe.register_fake
@sign.register_fake
@write.register_fake
@mark.register_fake
@compact.register_fake
def _in_place(*_: object) -> None:
    """Operators write into their arguments and return nothing."""
