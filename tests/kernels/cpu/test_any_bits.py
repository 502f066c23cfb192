"""Whatever bits keys, values and queries hold, every rule yields a victim."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from support.oracle import resolve
from support.paged import POISON, PagedLayer
from support.votes import assert_votes

from hashevict_vllm.kernels.cpu.openmp import find_openmp, share_items
from hashevict_vllm.policies.reference import ReferenceLayer

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULES: dict[str, dict[str, Any]] = {
    "vote": {"scoring": "vote"},
    "query": {"scoring": "instant", "hash_source": "query"},
    "key": {"scoring": "instant", "hash_source": "key"},
    "streaming_llm": {"name": "streaming_llm"},
    "l2_norm": {"name": "l2_norm"},
    "key_diff": {"name": "key_diff"},
    "random": {"name": "random", "seed": 3},
}
BITS = {
    torch.float32: (torch.int32, (0x7FC00000, 0x7F800000, 0x7F800001, 1, 0)),
    torch.bfloat16: (torch.int16, (0x7FC0, 0x7F80, 0x7F81, 1, 0)),
    torch.float16: (torch.int16, (0x7E00, 0x7C00, 0x7C01, 1, 0)),
}
"""An integer as wide as an element; its NaN, infinity, other NaN, denormal and zero."""

PROMPTS, OUTPUTS, HEADS, GROUP, DIM = (150, 30), 30, 2, 2, 32


def odd_rows(
    dtype: torch.dtype, kind: str, rows: int, heads: int, generator: torch.Generator
) -> torch.Tensor:
    """[rows, heads, D] of random bits, or of normal numbers among odd ones."""
    integer, odd = BITS[dtype]
    shape = (rows, heads, DIM)
    if kind == "random bits":
        info = torch.iinfo(integer)
        x = torch.randint(info.min, info.max, shape, generator=generator)
        return x.to(integer).view(dtype)
    x = torch.randn(shape, generator=generator).to(dtype)
    if kind == "zero keys":
        x[torch.rand(rows, heads, generator=generator) < 0.3] = 0
        return x
    # A few elements, or all of a row, of either sign; such tokens are every second one.
    which = torch.randint(len(odd), (rows, heads, 1), generator=generator)
    values = torch.tensor(odd)[which] | torch.where(which % 2 == 1, 0, -(2**31))
    if integer == torch.int16:
        values = torch.tensor(odd)[which] - torch.where(which % 2 == 1, 0, 2**15)
    values = values.to(integer).view(dtype).expand(shape)
    share = torch.tensor([0.0, 0.02, 1.0])[
        torch.randint(3, (rows, heads, 1), generator=generator)
    ]
    return torch.where(torch.rand(shape, generator=generator) < share, values, x)


def run(rule: str, segment: int | str, dtype: torch.dtype, kind: str) -> None:
    """Positions are distinct, protected ones are there, nothing else was written."""
    policy = resolve({**RULES[rule], "budget": 80, "segment": segment, "recent": 10})
    # Not by hash(), which differs from process to process for text.
    seed = zlib.crc32(f"{rule} {segment} {dtype} {kind}".encode())
    generator = torch.Generator().manual_seed(seed)
    totals = [prompt + OUTPUTS for prompt in PROMPTS]
    paged = PagedLayer(policy, list(PROMPTS), totals, HEADS, DIM, 32, dtype)
    streams = [
        tuple(
            odd_rows(dtype, kind, total, heads, generator)
            for heads in (HEADS * GROUP, HEADS, HEADS)
        )
        for total in totals
    ]
    while any(c < total for c, total in zip(paged.computed, totals, strict=True)):
        chunks: Any = []
        for start, prompt, stream in zip(paged.computed, PROMPTS, streams, strict=True):
            end = min(start + 70, prompt) if start < prompt else start + 1
            chunks.append(tuple(x[start:end] for x in stream))
        paged.step(chunks)
    for i, (total, (_, k, v)) in enumerate(zip(totals, streams, strict=True)):
        position, _, k_live, v_live = paged.live(i)
        newest = set(range(total - policy.recent, total))
        for head in range(HEADS):
            kept = position[head].tolist()
            assert len(set(kept)) == len(kept) == min(total, policy.budget)
            assert set(range(policy.sinks)) | newest <= set(kept)
            assert max(kept) < total
            for live, stream in ((k_live, k), (v_live, v)):
                expected = stream[position[head].long(), head]
                # Not bit by bit: torch's gather makes signalling NaNs quiet ones.
                assert torch.equal(live[head].isnan(), expected.isnan())
                numbers = ~expected.isnan()
                assert torch.equal(live[head][numbers], expected[numbers])
    assert bool((paged.kv_cache[0].view(torch.uint8) == POISON).all())


@pytest.mark.parametrize("kind", ["random bits", "odd numbers", "zero keys"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("segment", [1, 64])
@pytest.mark.parametrize("rule", RULES)
def test_any_bits_leave_the_budget_and_the_protected_slots(
    rule: str, segment: int, dtype: torch.dtype, kind: str
) -> None:
    run(rule, segment, dtype, kind)


def survivors(rule: str, keys: torch.Tensor, segment: int) -> tuple[list[int], ...]:
    """Positions that the kernels and the oracle keep of a prompt of keys [n, D]."""
    policy = resolve(
        {**RULES[rule], "budget": 48, "segment": segment, "sinks": 0, "recent": 2}
    )
    stream = keys[:, None]
    paged = PagedLayer(policy, [len(keys)], [len(keys)], 1, DIM, 32, torch.float32)
    paged.step([(stream, stream, stream)])
    oracle = ReferenceLayer(policy, len(keys), 1, DIM)
    oracle.forward(stream, stream, stream, 1.0)
    kept = oracle.slots.position[0].sort().values
    return paged.live(0)[0][0].tolist(), kept.tolist()


@pytest.mark.parametrize("segment", [1, 32])
@pytest.mark.parametrize("rule", ["l2_norm", "key_diff"])
def test_keys_that_are_not_finite_go_first(rule: str, segment: int) -> None:
    torch.manual_seed(0)
    keys = torch.randn(64, DIM)
    keys[5, 3], keys[9, 0], keys[20, 7] = float("nan"), float("-inf"), 3e38
    keys[30] = torch.tensor(-1, dtype=torch.int32).view(
        torch.float32
    )  # a NaN with sign
    found, expected = survivors(rule, keys, segment)
    assert found == expected
    assert not {5, 9, 20, 30} & set(found)


@pytest.mark.parametrize("segment", [1, 32])
@pytest.mark.parametrize("rule", ["l2_norm", "key_diff"])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-42])
def test_keys_without_length_are_ranked_as_the_oracle_ranks_them(
    rule: str, segment: int, value: float
) -> None:
    torch.manual_seed(1)
    keys = torch.randn(64, DIM)
    keys[::3] = value
    found, expected = survivors(rule, keys, segment)
    assert found == expected


@pytest.mark.parametrize("sinks", [{}, {0: NAN, 2: INF}, {0: INF, 2: NAN}])
def test_votes_stay_numbers_and_oracle_and_kernels_agree_on_them(
    sinks: dict[int, float],
) -> None:
    policy = resolve({"scoring": "vote", "budget": 80, "segment": 64, "pool": 1})
    torch.manual_seed(2)
    q, k, v = (torch.randn(150, n, DIM) for n in (4, 2, 2))
    k[40, 0, 3], k[50, 1] = NAN, INF
    q[140, 1], q[145] = INF, NAN
    for position, value in sinks.items():
        k[position, :, position] = value
    paged = PagedLayer(policy, [150], [150], 2, DIM, 32, torch.float32)
    paged.step([(q, k, v)])
    oracle = ReferenceLayer(policy, 150, 2, DIM)
    oracle.forward(q, k, v, DIM**-0.5)
    position, words, _, _ = paged.live(0)
    votes = words[..., -1].contiguous().view(torch.float32)
    assert bool(votes.isfinite().all())
    assert torch.equal(position.long(), oracle.slots.position)
    assert_votes(words, oracle.slots)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_no_number_give_no_credit(
    dtype: torch.dtype, value: float
) -> None:
    policy = resolve({"scoring": "vote", "budget": 80, "segment": 64})
    torch.manual_seed(2)
    q, k, v = (torch.randn(150, n, DIM).to(dtype) for n in (4, 2, 2))
    v[60, 0, 5] = value
    paged = PagedLayer(policy, [150], [150], 2, DIM, 32, dtype)
    paged.step([(q, k, v)])
    oracle = ReferenceLayer(policy, 150, 2, DIM)
    oracle.forward(q, k, v, DIM**-0.5)
    position, words, _, _ = paged.live(0)
    assert torch.equal(position.long(), oracle.slots.position)
    assert_votes(words, oracle.slots)


@njit
def _fails_at_3(done, first, last):
    for item in range(first, last):
        if item == 3:
            raise ValueError("item 3")
        done[item] = 1


@njit
def _share(done, items, start, threads):
    return share_items(_fails_at_3, (done,), items, start, threads)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_team_tells_of_a_failing_item_and_does_the_other_parts(threads: int) -> None:
    start = int(find_openmp()[0])
    done = np.zeros(8, np.int64)
    assert not _share(done, 8, start, threads)
    assert done[:3].all()
    assert not done[3]
    assert done[4:].all() == (threads == 4)
    assert _share(np.zeros(3, np.int64), 3, start, threads)


def test_a_kernel_without_a_victim_raises_and_writes_nothing_outside() -> None:
    protected = {"sinks": 2, "recent": 4}
    policy = resolve({"scoring": "instant", "budget": 40, "segment": 1, **protected})
    paged = PagedLayer(policy, [1], [50], 1, DIM, 32, torch.float32)
    row = torch.ones(1, 1, DIM)
    for _ in range(40):
        paged.step([(row, row, row)])
    paged.pages.slot_words[:, :, -1] = -1  # no slot is live
    before = paged.buffer.clone()
    with pytest.raises(RuntimeError, match="eviction kernel failed"):
        paged.step([(row, row, row)])
    assert torch.equal(paged.buffer, before)
