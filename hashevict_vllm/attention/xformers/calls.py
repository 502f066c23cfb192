"""What xformers is called with: biases, and which slots of the pages they are about.

Pages have a tail, and xformers' paged biases know one stride for all slots
(``page * page_size + slot``), so the live slots are gathered first, one request behind
the other. Packed like this they need no paged bias, and no padding: their bias is one
that CUTLASS, which runs on old GPUs, takes as well as FlashAttention. Paged biases
would say the same, but not to CUTLASS (``SUPPORTED_ATTN_BIAS_TYPES`` in
xformers/ops/fmha/{cutlass,flash,flash3}.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from xformers.ops.fmha.attn_bias import BlockDiagonalMask

SCRATCH_SLOTS = 32768
"""Slots gathered for one call, unless one request alone has more."""


@dataclass(frozen=True)
class Call:
    """One call of ``memory_efficient_attention_forward``.

    Attributes:
        rows: Rows of q that take part: consecutive requests.
        blocks: int64 [n], where the requests' live slots are: in which block,
        slots: int64 [n], and at which place in it.
        bias: Over ``n`` keys. Over as many queries as there are ``rows`` and causal,
            or, where ``folded``, over ``rows * group`` and not.
        folded: Whether every request has one query: then the query heads of a KV head
            take the place of tokens, and no operator need know of groups.

    """

    rows: slice
    blocks: torch.Tensor
    slots: torch.Tensor
    bias: BlockDiagonalMask
    folded: bool


@dataclass(frozen=True)
class _Request:
    index: int
    start: int
    queries: int
    live: int


def plan_calls(
    starts: Sequence[int],
    lens: Sequence[int],
    block_table: torch.Tensor,
    block_size: int,
    group: int,
) -> list[Call]:
    """The calls that serve a batch, each with a bounded number of keys.

    Args:
        starts: [R + 1], first row of each request in q; on the host, as xformers wants
            lists (``_SeqLenInfo.from_seqlens`` in xformers/ops/fmha/attn_bias.py).
        lens: [R], live slots of each request, its new tokens' among them.
        block_table: int32 [R, max blocks].
        block_size: N.
        group: Query heads per KV head.

    """
    requests = []
    for index, (start, end, live) in enumerate(
        zip(starts, starts[1:], lens, strict=False)
    ):
        if end > start:  # padding of a batch has no query
            # Only batches that vLLM makes up have fewer slots than tokens.
            requests.append(_Request(index, start, end - start, max(live, end - start)))
    return [_call(part, block_table, block_size, group) for part in _split(requests)]


def _split(requests: Sequence[_Request]) -> Iterator[list[_Request]]:
    """Consecutive requests that `SCRATCH_SLOTS` hold, or a single one."""
    part: list[_Request] = []
    total = 0
    for request in requests:
        if part and total + request.live > SCRATCH_SLOTS:
            yield part
            part, total = [], 0
        part.append(request)
        total += request.live
    if part:
        yield part


def _call(
    requests: list[_Request], block_table: torch.Tensor, block_size: int, group: int
) -> Call:
    device = block_table.device
    folded = all(request.queries == 1 for request in requests)
    bias = BlockDiagonalMask.from_seqlens(
        [group if folded else request.queries for request in requests],
        [request.live for request in requests],
        device=device,
    )
    if not folded:
        bias = bias.make_causal_from_bottomright()
    first, last = requests[0], requests[-1]
    table = block_table[first.index : last.index + 1]
    if len(table) > len(requests):
        indices = [request.index for request in requests]
        table = block_table[torch.tensor(indices, device=device)]
    blocks, slots = _places(bias, table, block_size)
    return Call(
        rows=slice(first.start, last.start + last.queries),
        blocks=blocks,
        slots=slots,
        bias=bias,
        folded=folded,
    )


def _places(
    bias: BlockDiagonalMask, table: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block and place of every key of a bias, without asking the device for a value."""
    starts, total = bias.k_seqinfo.seqstart, bias.k_seqinfo.seqstart_py[-1]
    owner = torch.repeat_interleave(starts.diff(), output_size=total)
    slot = torch.arange(total, device=table.device) - starts[owner]
    return table[owner, slot // block_size].long(), slot % block_size
