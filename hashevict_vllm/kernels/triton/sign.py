"""Signatures and squared norms of queries and keys, in one launch.

HashEvict paper, section 3: ``bit_j = (x . r_j >= 0)``. Sums are float32 throughout
(``ieee``, no TF32): a signature is compared with those of other steps and devices, and
the projection is the same on all.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_rows(
    q,
    k,
    tokens,
    member,
    dims,
    used,
    head,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
):
    """Elements float32 [M, n]: of queries for members below G, of the key for G."""
    inside = used[:, None] & (dims < DIM)[None, :]
    q_rows = tokens * q_token_stride + (head * GROUP + member) * q_head_stride
    k_rows = tokens * k_token_stride + head * k_head_stride
    is_query, is_key = (member < GROUP)[:, None], (member == GROUP)[:, None]
    columns = dims[None, :]
    x = tl.load(q + q_rows[:, None] + columns, mask=inside & is_query, other=0.0)
    y = tl.load(k + k_rows[:, None] + columns, mask=inside & is_key, other=0.0)
    return tl.where(is_key, y.to(tl.float32), x.to(tl.float32))


@triton.jit(do_not_specialize=["num_tokens"])
def sign_kernel(
    q,
    k,
    projection,
    signatures,
    squares,
    num_tokens,
    num_heads,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program: ``TOKENS`` tokens of one KV head, its G queries and its key.

    Args:
        q: [T, Hq, D], elements of a head contiguous, any float dtype.
        k: [T, Hkv, D], likewise.
        projection: float32 [D, b], contiguous.
        signatures: int32 [T, Hkv, G + 1, W], contiguous, written; the key's is last.
        squares: float32 [T, Hkv, G + 1], contiguous, written: squared norms.
        num_tokens: T.
        num_heads: Hkv.
        q_token_stride: Elements between tokens of q.
        q_head_stride: Elements between heads of q.
        k_token_stride: Elements between tokens of k.
        k_head_stride: Elements between heads of k.
        GROUP: G.
        MEMBERS: The power of two from G + 1 on.
        TOKENS: Tokens of a program, a power of two.
        DIM: D.
        BITS: b.
        WORDS: Words of a signature; 0 for rules that hash nothing.
        STEP: Elements of D per step of the product.

    """
    head = tl.program_id(1)
    index = tl.arange(0, TOKENS * MEMBERS)
    tokens = (tl.program_id(0) * TOKENS + index // MEMBERS).to(tl.int64)
    member = index % MEMBERS
    used = (tokens < num_tokens) & (member <= GROUP)
    out = (tokens * num_heads + head) * (GROUP + 1) + member
    step, bit = tl.arange(0, STEP), tl.arange(0, 32)
    for w in tl.static_range(WORDS):
        column = w * 32 + bit
        dots = tl.zeros([TOKENS * MEMBERS, 32], tl.float32)
        for first in range(0, DIM, STEP):
            dims = first + step
            x = _load_rows(
                q,
                k,
                tokens,
                member,
                dims,
                used,
                head,
                q_token_stride,
                q_head_stride,
                k_token_stride,
                k_head_stride,
                GROUP,
                DIM,
            )
            r = tl.load(
                projection + dims[:, None] * BITS + column[None, :],
                mask=(dims < DIM)[:, None] & (column < BITS)[None, :],
                other=0.0,
            )
            dots = tl.dot(x, r, dots, input_precision="ieee")
        ones = ((dots >= 0) & (column < BITS)[None, :]).to(tl.int32) << bit[None, :]
        # Every column has a bit of its own, so a sum gathers them.
        tl.store(signatures + out * WORDS + w, tl.sum(ones, 1), mask=used)
    square = tl.zeros([TOKENS * MEMBERS], tl.float32)
    for first in range(0, DIM, STEP):
        x = _load_rows(
            q,
            k,
            tokens,
            member,
            first + step,
            used,
            head,
            q_token_stride,
            q_head_stride,
            k_token_stride,
            k_head_stride,
            GROUP,
            DIM,
        )
        square += tl.sum(x * x, 1)
    tl.store(squares + out, square, mask=used)
