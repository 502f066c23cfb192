"""The numba kernels keep the same slots as the oracle, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from support.oracle import resolve
from support.paged import POISON, PagedLayer
from support.votes import assert_votes

from hashevict_vllm.kernels.codes import UNDESCRIBED
from hashevict_vllm.kernels.cpu import hash as cpu_hash
from hashevict_vllm.kernels.cpu.layer import pages_of, rule_of
from hashevict_vllm.kernels.cpu.views import unowned
from hashevict_vllm.kernels.cpu.votes import mark_losers
from hashevict_vllm.kernels.projection import make_projection, num_words
from hashevict_vllm.kernels.signature import pack_bits, signature_bits
from hashevict_vllm.policies.frame import KeyFrame
from hashevict_vllm.policies.reference import ReferenceLayer
from hashevict_vllm.resolved import ResolvedKVPolicy

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(
    policy: dict[str, Any],
    prompts: list[int],
    outputs: int,
    chunk: int,
    heads: int = 2,
    group: int = 2,
    head_dim: int = 32,
    block_size: int = 32,
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
) -> None:
    """Feed several requests in chunks; compare every request's live slots."""
    torch.manual_seed(0)
    resolved = resolve(policy, block_size)
    totals = [prompt + outputs for prompt in prompts]
    paged = PagedLayer(
        resolved, prompts, totals, heads, head_dim, block_size, dtype, threads
    )
    streams = [
        tuple(
            torch.randn(total, n, head_dim).to(dtype)
            for n in (heads * group, heads, heads)
        )
        for total in totals
    ]
    while any(paged.computed[i] < totals[i] for i in range(len(prompts))):
        step = []
        for i, stream in enumerate(streams):
            start = paged.computed[i]
            size = chunk if start < prompts[i] else 1
            end = min(start + size, max(prompts[i], start + 1), totals[i])
            step.append(tuple(x[start:end] for x in stream))
        paged.step(step)
    for i, (q, k, v) in enumerate(streams):
        scale = head_dim**-0.5
        oracle = ReferenceLayer(resolved, prompts[i], heads, head_dim)
        oracle.forward(q[: prompts[i]], k[: prompts[i]], v[: prompts[i]], scale)
        for t in range(prompts[i], totals[i]):
            oracle.forward(q[t : t + 1], k[t : t + 1], v[t : t + 1], scale)
        position, words, k_live, v_live = paged.live(i)
        assert torch.equal(position.long(), oracle.slots.position)
        known = torch.ones_like(position, dtype=torch.bool)
        if resolved.votes and len(oracle.slots) >= resolved.sinks:
            frame = KeyFrame.of(oracle.slots.k, resolved.sinks)
            described = frame.describe(oracle.slots.k)
            oracle.slots.bits = signature_bits(described.rest, oracle.projection)
            known = words[..., -2] != UNDESCRIBED
            assert bool(
                known[position < last_ballot(resolved, prompts[i], oracle.t)].all()
            )
            assert torch.equal(words[..., -2][known], described.words[known])
        if not resolved.votes or len(oracle.slots) >= resolved.sinks:
            packed = pack_bits(oracle.slots.bits)
            found = words[..., : packed.shape[-1]]
            assert torch.equal(found[known], packed[known])
        if resolved.votes:
            assert_votes(words, oracle.slots)
        assert torch.equal(k_live.float(), oracle.slots.k)
        assert torch.equal(v_live.float(), oracle.slots.v)
    assert bool((paged.kv_cache[0].view(torch.uint8) == POISON).all())


def last_ballot(policy: ResolvedKVPolicy, prompt_len: int, total: int) -> int:
    """Position of the last decoding token that has voted; 0 if none has."""
    return max(policy.voters(prompt_len, total, prompt_len), default=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("scoring", ["instant", "vote"])
def test_kernels_equal_the_oracle_for_every_dtype_and_head_size(
    scoring: str, dtype: torch.dtype, head_dim: int
) -> None:
    run(
        {"scoring": scoring, "budget": 80, "segment": 64, "recent": 10},
        prompts=[150, 30, 90],
        outputs=40,
        chunk=50,
        head_dim=head_dim,
        dtype=dtype,
    )


@pytest.mark.parametrize("hash_bits", [4, 8, 12, 16, 24, 32, 64, 100, 128])
@pytest.mark.parametrize(
    "rule",
    [
        {"scoring": "instant", "hash_source": "query"},
        {"scoring": "instant", "hash_source": "key"},
        {"scoring": "vote"},
    ],
    ids=lambda rule: "-".join(rule.values()),
)
def test_kernels_equal_the_oracle_for_every_signature_length(
    hash_bits: int, rule: dict[str, Any]
) -> None:
    run(
        {
            **rule,
            "budget": 80,
            "segment": 64,
            "hash_bits": hash_bits,
            "orthogonal": hash_bits % 16 == 0,
        },
        prompts=[130],
        outputs=60,
        chunk=200,
        group=3,
    )


@pytest.mark.parametrize("name", ["streaming_llm", "l2_norm", "key_diff", "random"])
@pytest.mark.parametrize("segment", [1, 64, "prompt"])
def test_kernels_equal_the_oracle_for_every_baseline(
    name: str, segment: int | str
) -> None:
    run(
        {"name": name, "budget": 80, "segment": segment, "seed": 3},
        prompts=[150, 30, 200],
        outputs=60,
        chunk=70,
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize(("segment", "recent"), [(1, 20), (64, 40), ("prompt", 20)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_equal_the_oracle_for_votes(
    segment: int | str, recent: int, dtype: torch.dtype
) -> None:
    run(
        {"scoring": "vote", "budget": 80, "segment": segment, "recent": recent},
        prompts=[150, 30, 300],
        outputs=60,
        chunk=70,
        group=3,
        dtype=dtype,
    )


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("scoring", ["instant", "vote"])
def test_threads_share_the_work_of_a_step(scoring: str, threads: int) -> None:
    run(
        {"scoring": scoring, "budget": 80, "segment": 64},
        prompts=[150, 30, 90, 200],
        outputs=60,
        chunk=70,
        heads=7,
        threads=threads,
    )


@settings(max_examples=40, deadline=None)
@given(
    budget=st.integers(45, 130),
    segment=st.sampled_from([1, 32, 64, 96, "prompt"]),
    sinks=st.integers(0, 4),
    recent=st.integers(3, 9),
    scoring=st.sampled_from(["instant", "vote"]),
    prompts=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    outputs=st.integers(0, 60),
    chunk=st.integers(1, 300),
    group=st.sampled_from([1, 2, 4]),
)
def test_kernels_equal_the_oracle_however_prompts_are_cut(
    budget: int,
    segment: int | str,
    sinks: int,
    recent: int,
    scoring: str,
    prompts: list[int],
    outputs: int,
    chunk: int,
    group: int,
) -> None:
    policy = {"budget": budget, "segment": segment, "sinks": sinks, "recent": recent}
    policy |= {"scoring": scoring} | ({"vote_every": 3} if scoring == "vote" else {})
    run(policy, prompts, outputs, chunk, heads=1, group=group)


def test_ties_go_to_the_oldest_position_not_to_the_lowest_slot() -> None:
    resolved = resolve(
        {
            **{"scoring": "instant", "budget": 40, "segment": 32},
            **{"sinks": 0, "recent": 0},
        }
    )
    paged = PagedLayer(resolved, [1], [200], 1, 32, 32, torch.float32)
    same = torch.ones(1, 1, 32)
    for _ in range(100):  # equal signatures: every eviction is a tie
        paged.step([(same, same, same)])
    position = paged.live(0)[0][0]
    assert position.tolist() == list(range(60, 100))


def test_signatures_equal_the_oracle_at_zero_and_for_extreme_values() -> None:
    projection = make_projection(32, 64, 0, True)
    x = torch.tensor([0.0, -0.0, 1e-30, -1e30, 3.0]).repeat_interleave(32).view(5, 32)
    for dtype in DTYPES:
        rows = x.to(dtype)[:4] if dtype == torch.float16 else x.to(dtype)
        words = np.zeros((len(rows), num_words(64)), np.int32)
        dots = np.zeros(64, np.float32)
        floats = rows.float().nan_to_num(posinf=6e4, neginf=-6e4)
        for row, out in zip(floats, words, strict=True):
            cpu_hash.hash_row(row.numpy(), projection.numpy().ravel(), dots, out)
        expected = pack_bits(signature_bits(rows.nan_to_num(), projection))
        assert torch.equal(torch.from_numpy(words), expected)


def open_segment(policy: dict[str, Any]) -> PagedLayer:
    """60 tokens of a segment of 64, more than a budget of 48 without sinks."""
    common = {"budget": 48, "segment": 64, "sinks": 0}
    torch.manual_seed(0)
    layer = PagedLayer(
        resolve({**common, **policy}), [200], [200], 1, 32, 32, DTYPES[0]
    )
    layer.step([tuple(torch.randn(60, 1, 32) for _ in "qkv")])
    return layer


MARKED = [~position for position in reversed(range(12))] + list(range(12, 60))
"""Positions, ascending, once the twelve oldest of `open_segment` are victims."""


def test_victims_are_marked_with_the_complement_so_that_position_0_is_too() -> None:
    layer = open_segment({"name": "streaming_llm"})
    assert layer.live(0)[0][0].tolist() == MARKED


def test_losers_of_a_ballot_are_marked_with_the_complement_as_well() -> None:
    layer = open_segment({"scoring": "vote", "window": 1, "value_weight": 0})
    pages = layer.pages
    where = (pages.elements, pages.tail, layer.k_map, layer.v_map)
    geometry = pages.kernel_geometry
    numbers = (layer.rule, layer.projection, geometry[8], layer.strengths)
    # Nobody has voted yet: ties keep the newer slots.
    kept = (48, layer.policy.recent)
    _mark_losers((*where, geometry), numbers, layer.block_table, 60, *kept)
    assert layer.live(0)[0][0].tolist() == MARKED


@njit
def _mark_losers(where, numbers, block_table, num_slots, budget, recent):  # type: ignore[no-untyped-def]
    pages, rule = pages_of(*where), rule_of(*numbers)
    blocks = unowned(block_table)[0]
    mark_losers(pages, rule, blocks, num_slots, 0, num_slots, False, budget, recent)
