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
    scale: float,
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
        scale: Softmax scale.
        factor: See `hashevict_vllm.policies.vote.estimate_scale`.
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
        projections(r, pieces, num_heads, members),
        frames(r, pieces, k_cache),
        slots,
        scale,
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
    """Signatures and numbers of the keys just written, for rules that vote.

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
    num_pieces, head_dim = pieces.shape[0], k_cache.shape[3]
    scratch = frames(r, pieces, k_cache)
    if r.sinks:
        frame_kernel[(num_pieces, num_heads)](
            scratch,
            pieces,
            block_table,
            k_cache,
            k_scale,
            num_heads,
            block_table.stride(0),
            *k_cache.stride()[:3],
            SINKS=r.sinks,
            DIM=head_dim,
            DIM_PADDED=launch.padded(head_dim),
            N=tail.shape[3],
            **launch.FRAME_OPTIONS,
        )
    tokens = launch.describe_tokens(num_tokens)
    programs = triton.cdiv(num_tokens, tokens)
    of_sinks = num_pieces * triton.cdiv(r.sinks, tokens)
    describe_kernel[(programs + of_sinks, num_heads)](
        projection,
        scratch,
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
        DIM=head_dim,
        BITS=r.bits,
        COLUMNS=max(launch.padded(r.bits), 32),
        TOKENS=tokens,
        STEP=launch.SIGN_STEP,
        N=tail.shape[3],
        **launch.DESCRIBE_OPTIONS,
    )


@plan.register_fake
@describe.register_fake
@sign.register_fake
@write.register_fake
def _in_place(*_: object) -> None:
    """Operators write into their arguments and return nothing."""
