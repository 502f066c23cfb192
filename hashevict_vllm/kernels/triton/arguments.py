"""What kernels take, in groups: named tuples, which Triton passes field by field.

`Tokens`, `Signed`, `Step`, `Page` and `Estimate` hold tensors and strides; `DeviceRule`
(see `rule`) and `Sizes` are compile-time constants, each as a whole. A kernel sees the
fields of a tuple, not its properties; before Triton 3.8 a field that is a shape needs a
name of its own there: ``members: tl.constexpr = sizes.members``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from hashevict_vllm.kernels.pages import DevicePages
from hashevict_vllm.kernels.triton import launch
from hashevict_vllm.kernels.triton.rule import DeviceRule


class Sizes(NamedTuple):
    """Sizes of a layer, constant for an engine.

    Attributes:
        dim: D.
        dim_padded: The power of two from D on.
        group: G, query heads per KV head.
        members: G', the power of two from G on.
        hashed: W', words of a signature.
        block: N, slots of a block.

    """

    dim: int
    dim_padded: int
    group: int
    members: int
    hashed: int
    block: int

    @classmethod
    def of(cls, rule: DeviceRule, page: Page, group: int) -> Sizes:
        """The sizes of the layer that ``page`` belongs to."""
        dim = page.k.shape[3]
        return cls(
            dim=dim,
            dim_padded=launch.padded(dim),
            group=group,
            members=launch.padded(group),
            hashed=rule.hashed,
            block=page.tail.shape[3],
        )


class Page(NamedTuple):
    """The pages of one layer.

    Attributes:
        k: K of block 0, head 0, slot 0; elements of a slot contiguous.
        v: The same for V.
        tail: int32, words and positions of slots, see `meta_of`.
        k_scale: float32 [1], what fp8 slots are divided by; None for other dtypes.
        v_scale: The same for V.
        k_block: Elements between blocks of K.
        k_head: Elements between heads of K in a page.
        k_slot: Elements between slots of K.
        v_block: Elements between blocks of V.
        v_head: Elements between heads of V in a page.
        v_slot: Elements between slots of V.
        block: Words between blocks of the tail.
        head: Words between heads of the tail.
        word: Words between two words of a slot.

    """

    k: Any
    v: Any
    tail: Any
    k_scale: Any
    v_scale: Any
    k_block: int
    k_head: int
    k_slot: int
    v_block: int
    v_head: int
    v_slot: int
    block: int
    head: int
    word: int

    @classmethod
    def of(
        cls,
        pages: DevicePages,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
    ) -> Page:
        """The arguments for a layer's pages.

        Raises:
            ValueError: For elements of a slot that are not contiguous.

        """
        launch.check_rows(k_cache=pages.k, v_cache=pages.v, tail=pages.tail)
        return cls(
            *(pages.k, pages.v, pages.tail, k_scale, v_scale),
            *pages.k.stride()[:3],
            *pages.v.stride()[:3],
            *pages.tail.stride()[:3],
        )


class Tokens(NamedTuple):
    """Queries, keys and values of a step, as the model calculated them.

    Attributes:
        q: [T, Hq, D], elements of a head contiguous, any float dtype.
        k: [T, Hkv, D], likewise.
        v: [T, Hkv, D], likewise.
        q_token: Elements between tokens of q.
        q_head: Elements between heads of q.
        k_token: Elements between tokens of k.
        k_head: Elements between heads of k.
        v_token: Elements between tokens of v.
        v_head: Elements between heads of v.

    """

    q: Any
    k: Any
    v: Any
    q_token: int
    q_head: int
    k_token: int
    k_head: int
    v_token: int
    v_head: int

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tokens:
        """The arguments for a step's tokens.

        Raises:
            ValueError: For elements of a head that are not contiguous.

        """
        launch.check_rows(q=q, k=k, v=v)
        return cls(q, k, v, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2])

    @classmethod
    def asking(cls, q: torch.Tensor) -> Tokens:
        """The arguments for queries alone.

        Raises:
            ValueError: For elements of a head that are not contiguous.

        """
        launch.check_rows(q=q)
        token, head = q.stride()[:2]
        return cls(q, None, None, token, head, 0, 0, 0, 0)


class Step(NamedTuple):
    """What a round does with each request, and where requests have their slots.

    Attributes:
        pieces: int32 [P, columns], see `pieces`.
        token_piece: int32 [T], row of ``pieces`` of each token; -1 for padding.
        table: int32 [R, max blocks], vLLM's block table.
        row: Elements between rows of the block table.
        heads: Hkv.

    """

    pieces: Any
    token_piece: Any
    table: Any
    row: int
    heads: int

    @classmethod
    def of(
        cls,
        pieces: torch.Tensor,
        token_piece: torch.Tensor | None,
        table: torch.Tensor,
        heads: int,
    ) -> Step:
        """The arguments of a round; ``token_piece`` is None where no token is meant."""
        return cls(pieces, token_piece, table, table.stride(0), heads)


class Signed(NamedTuple):
    """What `sign` writes of a step's tokens.

    Attributes:
        signatures: int32 [T, Hkv, G + 1, W'], contiguous; the key's is last.
        squares: float32 [T, Hkv, G + 1], contiguous: squared norms.

    """

    signatures: Any
    squares: Any


class Estimate(NamedTuple):
    """How rules that vote guess attention.

    Attributes:
        projection: float32 [D, b], contiguous.
        scale: Softmax scale.
        factor: See `hashevict_vllm.policies.vote.estimate_scale`.
        decay: Factor on earlier votes.
        credit: ``value_weight`` times the window, see
            `hashevict_vllm.policies.value.credit_weight`; 0 for no credit.
        value_votes: Votes of a ballot for large values.
        bits: b, unknown to the compiler, which would unroll sums and spill.
        length: D, likewise.

    """

    projection: Any
    scale: float
    factor: float
    decay: float
    credit: float
    value_votes: float
    bits: int
    length: int

    @classmethod
    def of(
        cls,
        projection: torch.Tensor,
        scale: float,
        factor: float,
        decay: float,
        credit: float,
        value_votes: float,
    ) -> Estimate:
        """The arguments for a projection, and for what was calculated from a policy."""
        length, bits = projection.shape
        numbers = (scale, factor, decay, credit, value_votes)
        return cls(projection, *numbers, bits, length)


class Scratch(NamedTuple):
    """Memory of ballots, as much as programs run at once; the contents mean nothing.

    Attributes:
        projected: float32 [programs, b + 2, G'], queries as they meet slots.
        frames: float64 [programs, 3, D].
        found: int32 [programs, C], slots that are to be described.
        guessed: float32 [programs, G', C], logits.

    """

    projected: Any
    frames: Any
    found: Any
    guessed: Any

    @classmethod
    def of(
        cls, rule: DeviceRule, jobs: int, group: int, dim: int, device: torch.device
    ) -> Scratch:
        """Scratch for so many pieces times KV heads; none for rules without votes."""
        members = launch.padded(group)
        room = launch.BALLOT_BYTES // (4 * members * rule.budget)
        most = min(launch.BALLOT_PROGRAMS, max(room, 1))
        programs = min(jobs, most) if rule.votes else 0

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((programs, *shape), dtype=dtype, device=device)

        return cls(
            projected=empty(rule.bits + 2, members, dtype=torch.float32),
            frames=empty(3, dim, dtype=torch.float64),
            found=empty(rule.budget, dtype=torch.int32),
            guessed=empty(members, rule.budget, dtype=torch.float32),
        )


class Asked(NamedTuple):
    """Memory of the votes on a segment, see `hashevict_vllm.kernels.triton.segment`.

    Attributes:
        projected: float32 [P, Hkv, window, b + 2, G'], queries as they meet slots.
        tops: float32 [P, Hkv, window, G', tiles], largest logit of a tile of slots.
        sums: float32, likewise, sum of exp(logit - top).
        totals: float32 [P, Hkv, window, G', 2], largest logit, and 1 / sum.

    """

    projected: Any
    tops: Any
    sums: Any
    totals: Any


class Unlike(NamedTuple):
    """Memory of credit for values, see `hashevict_vllm.kernels.triton.value`.

    Attributes:
        sums: float32 [P, Hkv, slices, D], of values; None for no credit.
        apart: float32 [P, Hkv, positions], squared distances from the mean, by
            position; zero where no slot has it.
        beside: float32 [P, Hkv, slots], the average of neighbours, by slot.
        totals: float32 [P, Hkv, tiles], sums of a tile of these.
        weight: See `Estimate.credit`.

    """

    sums: Any
    apart: Any
    beside: Any
    totals: Any
    weight: float


class Head(NamedTuple):
    """One KV head of one request, made within a kernel.

    Attributes:
        page: `Page`.
        table: int32 pointer to the request's block numbers.
        index: The head.

    """

    page: Any
    table: Any
    index: Any
