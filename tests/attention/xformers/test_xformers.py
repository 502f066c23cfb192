"""The xformers backend: which slots queries see, and how they are gathered.

xformers' own biases, materialized, are the oracle of masks here. No operator of it
runs on a CPU; `tests/interpreted` runs the rest of the path.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import pytest
import torch
from support import xformers_reference
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.v1.kv_cache_layout import KVCacheLayout
from xformers.ops.fmha import attn_bias, cutlass, flash, flash3
from xformers.ops.fmha.common import Inputs

from hashevict_vllm.attention.xformers import attend as xformers_attend
from hashevict_vllm.attention.xformers import calls as xformers_calls
from hashevict_vllm.config import KVPolicyConfig
from hashevict_vllm.policies.reference import ReferenceLayer

N, WIDTH, GROUP = 16, 6, 3
POLICY = KVPolicyConfig.from_dict(
    {"name": "hashevict", "budget": 64, "segment": 32, "recent": 16}
).resolve(512, 16)

BATCHES = {
    "decode, budgets full and not": ([1, 1, 1, 1], [64, 64, 7, 1]),
    "prompts from the start": ([20, 5, 33], [20, 5, 33]),
    "chunks behind a full budget": ([32, 32], [96, 96]),
    "mixed": ([1, 25, 1, 7], [64, 89, 33, 7]),
    "padding between and behind": ([1, 0, 1, 0, 0], [50, 0, 64, 3, 0]),
    "mixed, with padding": ([0, 9, 1, 0], [0, 40, 64, 0]),
    "one token of a prompt": ([1], [1]),
}


def block_table(requests: int) -> torch.Tensor:
    torch.manual_seed(0)
    blocks = torch.randperm(requests * WIDTH) + 1  # block 0 is nobody's
    return blocks.view(requests, WIDTH).int()


def starts_of(counts: list[int]) -> list[int]:
    return [0, *accumulate(counts)]


def attended(calls: list[xformers_calls.Call], rows: int) -> list[set[int]]:
    """For each row of q the places (block * N + slot) that its calls let it see."""
    seen: list[set[int]] = [set() for _ in range(rows)]
    for call in calls:
        places = call.blocks * N + call.slots
        count = call.rows.stop - call.rows.start
        queries = call.bias.q_seqinfo.seqstart_py[-1]
        mask = call.bias.materialize((queries, len(places))) == 0
        mask = mask.view(count, -1, len(places))
        assert mask.shape[1] == (GROUP if call.folded else 1)
        for row, heads in enumerate(mask, call.rows.start):
            assert torch.equal(heads, heads[:1].expand_as(heads))
            assert not seen[row]  # every row is in one call
            seen[row] = set(places[heads[0]].tolist())
    return seen


@pytest.mark.parametrize("most", [32768, 70])
@pytest.mark.parametrize("name", BATCHES)
def test_queries_see_what_the_live_slots_before_them_are(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xformers_calls, "SCRATCH_SLOTS", most)
    counts, lens = BATCHES[name]
    table, starts = block_table(len(counts)), starts_of(counts)
    calls = xformers_calls.plan_calls(starts, lens, table, N, GROUP)
    assert most > 70 or all(
        len(call.slots) <= max(most, *lens) for call in calls if call.slots.numel()
    )
    expected = []
    for request, (count, live) in enumerate(zip(counts, lens, strict=True)):
        order = [int(table[request, s // N]) * N + s % N for s in range(live)]
        expected += [set(order[: live - count + 1 + i]) for i in range(count)]
    assert attended(calls, starts[-1]) == expected


@pytest.mark.parametrize("name", BATCHES)
def test_queries_see_what_a_paged_bias_of_xformers_lets_them(name: str) -> None:
    counts, lens = BATCHES[name]
    table, starts = block_table(len(counts)), starts_of(counts)
    calls = xformers_calls.plan_calls(starts, lens, table, N, GROUP)
    paged = attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        counts, lens, table, N
    )
    mask = paged.materialize((starts[-1], len(counts) * WIDTH * N)) == 0
    expected = [set(row.nonzero().flatten().tolist()) for row in mask]
    assert attended(calls, starts[-1]) == expected


def test_packed_keys_suit_every_operator_and_paged_ones_not_the_old_gpus() -> None:
    """Why slots are gathered one behind the other, and not page by page."""
    packed = {
        attn_bias.BlockDiagonalMask,
        attn_bias.BlockDiagonalCausalFromBottomRightMask,
    }
    for operator in (cutlass.FwOp, flash.FwOp, flash3.FwOp):
        assert packed <= set(operator.SUPPORTED_ATTN_BIAS_TYPES)
    paged = attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
    assert paged not in cutlass.FwOp.SUPPORTED_ATTN_BIAS_TYPES
    assert cutlass.FwOp.CUDA_MINIMUM_COMPUTE_CAPABILITY < (7, 0)
    assert flash.FwOp.CUDA_MINIMUM_COMPUTE_CAPABILITY == (8, 0)


def test_the_oracle_is_causal_as_xformers_is() -> None:
    torch.manual_seed(0)
    heads, dim, chunks = 2, 8, [5, 1, 1, 9]
    layer = ReferenceLayer(POLICY, 100, heads, dim)  # the budget is never full
    q, k, v = (torch.randn(sum(chunks), n, dim) for n in (heads * GROUP, heads, heads))
    got = torch.cat(
        [
            layer.forward(q[rows], k[rows], v[rows], 0.5)
            for rows in torch.arange(sum(chunks)).split(chunks)
        ]
    )
    expected, end = [], 0
    for count in chunks:
        rows, end = slice(end, end + count), end + count
        bias = attn_bias.BlockDiagonalMask.from_seqlens([count], [end])
        shape = (1, -1, heads, GROUP, dim)
        grouped = (1, end, heads, GROUP, dim)
        expected.append(
            xformers_reference.attention(
                q[rows].view(shape),
                k[None, :end, :, None].expand(grouped),
                v[None, :end, :, None].expand(grouped),
                bias.make_causal_from_bottomright(),
                0.5,
            )
        )
    torch.testing.assert_close(got, torch.cat(expected, 1)[0].flatten(1, 2))


# -- gathering -------------------------------------------------------------------

LAYOUTS = [layout for layout in KVCacheLayout if layout.is_block_compact]


def poisoned_cache(
    layout: KVCacheLayout, blocks: int, heads: int, dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """[B, H, N, 2D] of the second of three layers; every page ends in a tail of NaN."""
    layers, content, tail = 3, 2 * dim, 40
    page = heads * N * content + tail
    raw = torch.full((layers * blocks * page,), float("nan"), dtype=dtype)
    outer = {"LB": (blocks * page, page), "BL": (page, layers * page)}
    inner = {"HN": (N * content, content), "NH": (content, heads * content)}
    name = layout.name
    layer, block = outer[name[:2]]
    cache = raw.as_strided(
        (blocks, heads, N, content), (block, *inner[name[2:4]], 1), layer
    )
    cache.copy_(torch.randn(cache.shape))
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_gathered_slots_are_those_of_the_pages(
    layout: KVCacheLayout, dtype: torch.dtype
) -> None:
    heads, dim, (counts, lens) = 2, 8, BATCHES["mixed"]
    table = block_table(len(counts))
    cache = poisoned_cache(layout, int(table.max()) + 1, heads, dim, dtype)
    calls = xformers_calls.plan_calls(starts_of(counts), lens, table, N, GROUP)
    (call,) = calls
    k, v = xformers_attend.gather(cache, call)
    at = 0
    for request, live in enumerate(lens):
        for slot in range(live):
            place = cache[int(table[request, slot // N]), :, slot % N]
            assert torch.equal(k[at], place[:, :dim])
            assert torch.equal(v[at], place[:, dim:])
            at += 1
    assert at == len(k) == len(v)
    # As operators want it: heads side by side, no further copy.
    assert k.stride() == v.stride() == (heads * 2 * dim, 2 * dim, 1)


def test_all_layouts_that_a_page_with_a_tail_may_have_were_tried() -> None:
    assert {layout.name for layout in LAYOUTS} == {"LBNHC", "LBHNC", "BLNHC", "BLHNC"}


@pytest.mark.parametrize("name", BATCHES)
def test_a_step_is_planned_without_asking_the_device(name: str) -> None:
    """A fake tensor has no value to tell: asking for one raises."""
    counts, lens = BATCHES[name]
    with FakeTensorMode():
        table = torch.empty(len(counts), WIDTH, dtype=torch.int32)
        cache = torch.empty(99, 2, N, 16)
        calls = xformers_calls.plan_calls(starts_of(counts), lens, table, N, GROUP)
        live = sum(n for count, n in zip(counts, lens, strict=True) if count)
        assert sum(len(xformers_attend.gather(cache, c)[0]) for c in calls) == live


class Streams:
    """In the place of CUDA's: CUTLASS starts one for every KV head of a prompt."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass


@pytest.mark.parametrize("name", BATCHES)
def test_torch_accepts_what_cutlass_is_called_with(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`aten._efficient_attention_forward` checks shapes of fake tensors, too."""

    def operator(q: Any, k: Any, v: Any, bias: Any, scale: float) -> Any:
        return cutlass.FwOp.apply(Inputs(q, k, v, bias, scale=scale), False)[0]

    monkeypatch.setattr(xformers_reference.SEAM, operator)
    monkeypatch.setattr(torch.cuda, "current_stream", Streams)
    monkeypatch.setattr(torch.cuda, "Stream", Streams)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    counts, lens = BATCHES[name]
    with FakeTensorMode():
        table = torch.empty(len(counts), WIDTH, dtype=torch.int32)
        cache = torch.empty(99, 2, N, 16, dtype=torch.float16)
        query = torch.empty(sum(counts), 2 * GROUP, 8, dtype=torch.float16)
        for call in xformers_calls.plan_calls(starts_of(counts), lens, table, N, GROUP):
            k, v = xformers_attend.gather(cache, call)
            rows = query[call.rows]
            output = xformers_attend.attend(rows, k, v, call, 0.5)
            assert output.shape == rows.shape
