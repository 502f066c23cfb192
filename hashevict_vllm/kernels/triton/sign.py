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
    tokens, rows, member, dims, used, head, GROUP: tl.constexpr, DIM: tl.constexpr
):
    """Elements float32 [M, n]: of queries for members below G, of the key for G."""
    inside = used[:, None] & (dims < DIM)[None, :]
    q_rows = rows * tokens.q_token + (head * GROUP + member) * tokens.q_head
    k_rows = rows * tokens.k_token + head * tokens.k_head
    is_query, is_key = (member < GROUP)[:, None], (member == GROUP)[:, None]
    columns = dims[None, :]
    x = tl.load(tokens.q + q_rows[:, None] + columns, mask=inside & is_query, other=0.0)
    y = tl.load(tokens.k + k_rows[:, None] + columns, mask=inside & is_key, other=0.0)
    return tl.where(is_key, y.to(tl.float32), x.to(tl.float32))


@triton.jit(do_not_specialize=["num_tokens"])
def sign_kernel(
    tokens,
    projection,
    signed,
    num_tokens,
    num_heads,
    rule: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    WORDS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program: ``TOKENS`` tokens of one KV head, its G queries and its key.

    Args:
        tokens: `Tokens`.
        projection: float32 [D, b], contiguous.
        signed: `Signed`, written.
        num_tokens: T.
        num_heads: Hkv.
        rule: `DeviceRule`.
        GROUP: G.
        MEMBERS: The power of two from G + 1 on.
        TOKENS: Tokens of a program, a power of two.
        DIM: D.
        WORDS: Words of a signature; 0 for rules that hash nothing.
        STEP: Elements of D per step of the product.

    """
    head = tl.program_id(1)
    index = tl.arange(0, TOKENS * MEMBERS)
    rows = (tl.program_id(0) * TOKENS + index // MEMBERS).to(tl.int64)
    member = index % MEMBERS
    used = (rows < num_tokens) & (member <= GROUP)
    out = (rows * num_heads + head) * (GROUP + 1) + member
    lane, bit = tl.arange(0, STEP), tl.arange(0, 32)
    for w in tl.static_range(WORDS):
        column = w * 32 + bit
        dots = tl.zeros([TOKENS * MEMBERS, 32], tl.float32)
        for first in range(0, DIM, STEP):
            dims = first + lane
            x = _load_rows(tokens, rows, member, dims, used, head, GROUP, DIM)
            r = tl.load(
                projection + dims[:, None] * rule.bits + column[None, :],
                mask=(dims < DIM)[:, None] & (column < rule.bits)[None, :],
                other=0.0,
            )
            dots = tl.dot(x, r, dots, input_precision="ieee")
        ones = ((dots >= 0) & (column < rule.bits)[None, :]).to(tl.int32)
        # Every column has a bit of its own, so a sum gathers them.
        words = tl.sum(ones << bit[None, :], 1)
        tl.store(signed.signatures + out * WORDS + w, words, mask=used)
    square = tl.zeros([TOKENS * MEMBERS], tl.float32)
    for first in range(0, DIM, STEP):
        x = _load_rows(tokens, rows, member, first + lane, used, head, GROUP, DIM)
        square += tl.sum(x * x, 1)
    tl.store(signed.squares + out, square, mask=used)
