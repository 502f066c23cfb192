"""The Triton kernels keep the same slots as the oracle, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.oracle import resolve
from support.paged_triton import LAYOUTS, POISON, SCALE, TritonLayer
from support.votes import assert_votes

from hashevict_vllm.kernels.codes import UNDESCRIBED
from hashevict_vllm.kernels.projection import make_projection
from hashevict_vllm.kernels.signature import pack_bits, signature_bits
from hashevict_vllm.kernels.triton import launch
from hashevict_vllm.policies.frame import KeyFrame
from hashevict_vllm.policies.reference import ReferenceLayer
from hashevict_vllm.resolved import ResolvedKVPolicy

# bfloat16 too: the interpreter cannot calculate in it, but the kernels, which only
# convert it to float32 and move it, do not ask it to.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

RULES: dict[str, dict[str, Any]] = {
    "query": {"scoring": "instant"},
    "key": {"scoring": "instant", "hash_source": "key", "hash_bits": 20},
    "vote": {"scoring": "vote", "window": 4, "hash_bits": 16, "vote_every": 3},
    "vote, unpooled": {"scoring": "vote", "hash_bits": 12, "pool": 1, "vote_every": 1},
    "recency": {"name": "streaming_llm"},
    "norm": {"name": "l2_norm"},
    "random": {"name": "random", "seed": 3},
}


KEYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "no first key": lambda k: k * (torch.arange(len(k)) > 0)[:, None, None],
    "no other sinks": lambda k: k * (torch.arange(len(k)) // 20 != 0)[:, None, None],
    "parallel sinks": lambda k: torch.cat(
        [2 * k[:1], k[:1].expand(19, -1, -1), k[20:]]
    ),
    "all parallel": lambda k: k[:1] * torch.linspace(-2, 3, len(k))[:, None, None],
    "all equal": lambda k: k[:1].expand(len(k), -1, -1),
    "along the first alone": lambda k: torch.cat([100 * k[:1], k[1:] + 100 * k[:1]]),
    "so large that a step's exponent has its highest bit": lambda k: k * 1e30,
    "so small that a step is zero": lambda k: k * 1e-38,
}
"""Twenty sinks and what follows them, where a frame or a number degenerates."""


def check_words(
    words: torch.Tensor,
    k: torch.Tensor,
    policy: ResolvedKVPolicy,
    known: torch.Tensor | None = None,
) -> None:
    """Signature and numbers [Hkv, n, W - 1] are those that the oracle gives to k.

    Where ``known`` (bool [Hkv, n]) is not set, slots may wait for a ballot.
    """
    described = KeyFrame.of(k, policy.sinks).describe(k)
    waits = torch.zeros(k.shape[:2], dtype=torch.bool)
    if known is not None:
        waits = (words[..., -1] == UNDESCRIBED) & ~known
    assert torch.equal(words[..., -1][~waits], described.words[~waits])
    projection = make_projection(
        k.shape[-1], policy.hash_bits, policy.seed, policy.orthogonal
    )
    signatures = pack_bits(signature_bits(described.rest, projection))
    assert torch.equal(words[..., :-1][~waits], signatures[~waits])


def run(
    policy: dict[str, Any],
    prompts: list[int],
    outputs: int,
    chunk: int,
    heads: int = 1,
    group: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    layout: str = LAYOUTS[0],
    padding: int = 0,
) -> None:
    """Feed several requests in chunks; compare every request's live slots."""
    torch.manual_seed(0)
    resolved = resolve(policy, block_size)
    totals = [prompt + outputs for prompt in prompts]
    layer = TritonLayer(
        resolved, prompts, totals, heads, group, head_dim, block_size, dtype, layout
    )
    streams = [
        tuple(
            torch.randn(total, n, head_dim).to(dtype)
            for n in (heads * group, heads, heads)
        )
        for total in totals
    ]
    while any(layer.computed[i] < totals[i] for i in range(len(prompts))):
        step = []
        for i, stream in enumerate(streams):
            start = layer.computed[i]
            size = chunk if start < prompts[i] else 1
            end = min(start + size, max(prompts[i], start + 1), totals[i])
            step.append(tuple(x[start:end] for x in stream))
        layer.step(step, padding)
    for i, (q, k, v) in enumerate(streams):
        oracle = ReferenceLayer(resolved, prompts[i], heads, head_dim)
        oracle.forward(q[: prompts[i]], k[: prompts[i]], v[: prompts[i]], SCALE)
        for t in range(prompts[i], totals[i]):
            oracle.forward(q[t : t + 1], k[t : t + 1], v[t : t + 1], SCALE)
        position, words, k_live, v_live = layer.live(i)
        assert torch.equal(position.long(), oracle.slots.position)
        if resolved.votes:
            if len(oracle.slots) >= resolved.sinks:
                # What a ballot has met, or its prompt has brought, is described.
                voters = resolved.voters(prompts[i], totals[i], prompts[i])
                met = voters[-1] + 1 if voters else prompts[i]
                known = oracle.slots.position < met
                check_words(words[..., :-1], oracle.slots.k, resolved, known)
                assert_votes(words, oracle.slots)
        elif oracle.rule.projected_bits:
            packed = pack_bits(oracle.slots.bits)
            assert torch.equal(words[..., : packed.shape[-1]], packed)
        assert torch.equal(k_live.float(), oracle.slots.k)
        assert torch.equal(v_live.float(), oracle.slots.v)
    assert layer.untouched()


# An example takes seconds, so a failing one is reported as it is, not made smaller.
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_kernels_equal_the_oracle_however_batches_are_made(data: st.DataObject) -> None:
    draw = data.draw
    rule = draw(st.sampled_from(sorted(RULES)))
    budget = draw(st.integers(24, 45))
    segment = draw(st.sampled_from([1, 16, 32, "prompt"]))
    step = segment if isinstance(segment, int) else 32
    around_the_budget = st.sampled_from([budget - 1, budget, budget + 1, budget + step])
    prompts = draw(st.lists(around_the_budget | st.integers(1, 60), max_size=1))
    # Tiles smaller than a request make the scans loop.
    with mock.patch.object(launch, "SCAN_TILE", draw(st.sampled_from([32, 1024]))):
        run(
            {
                "budget": budget,
                "segment": segment,
                "sinks": draw(st.integers(0, 3)),
                "recent": draw(st.integers(3, 5)),
                **RULES[rule],
            },
            prompts=[*prompts, draw(around_the_budget)],
            outputs=draw(st.integers(0, 4)),
            chunk=draw(st.integers(15, 70)),
            group=draw(st.sampled_from([1, 3])),
            head_dim=draw(st.sampled_from([16, 24])),
            dtype=draw(st.sampled_from(DTYPES)),
            layout=draw(st.sampled_from(LAYOUTS)),
            padding=draw(st.integers(0, 2)),
        )


@pytest.mark.parametrize("rule", sorted(RULES))
def test_kernels_equal_the_oracle_for_every_rule(rule: str) -> None:
    run(
        {"budget": 30, "segment": 32, "sinks": 4, "recent": 4, **RULES[rule]},
        prompts=[4, 62],  # one ends with its sinks
        outputs=3,
        chunk=70,
        heads=2,
    )


@pytest.mark.parametrize(("rule", "recent"), [("query", 4), ("vote", 4), ("vote", 80)])
def test_kernels_equal_the_oracle_where_requests_span_several_tiles(
    rule: str, recent: int
) -> None:
    with mock.patch.object(launch, "SCAN_TILE", 32):
        run(
            {"budget": 120, "segment": 32, "recent": recent, **RULES[rule]},
            prompts=[152],
            outputs=2,
            chunk=200,
            group=1,
        )


@pytest.mark.parametrize(
    ("head_dim", "block_size", "bits", "dtype"),
    [
        (64, 16, 64, torch.float32),
        (80, 48, 100, torch.float16),
        (96, 32, 12, torch.bfloat16),
        (128, 64, 128, torch.float32),
        (256, 128, 32, torch.bfloat16),
    ],
)
def test_kernels_equal_the_oracle_for_every_head_and_block_size(
    head_dim: int, block_size: int, bits: int, dtype: torch.dtype
) -> None:
    budget = block_size + 9
    run(
        {
            "scoring": "vote" if dtype == torch.float32 else "instant",
            "hash_bits": bits,
            "budget": budget,
            "segment": block_size,
            "sinks": 2,
            "recent": 4,
            **({"window": 4, "vote_every": 2} if dtype == torch.float32 else {}),
        },
        prompts=[budget + 6],
        outputs=2,
        chunk=100,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        layout=LAYOUTS[1],
    )


@pytest.mark.parametrize("name", KEYS)
def test_keys_are_described_as_by_the_oracle_where_a_frame_degenerates(
    name: str,
) -> None:
    torch.manual_seed(0)
    policy = resolve(
        {"scoring": "vote", "budget": 60, "sinks": 20, "recent": 8, "hash_bits": 36}, 16
    )
    layer = TritonLayer(policy, [40], [40], 2, 1, 24, 16, torch.float32)
    k = KEYS[name](torch.randn(40, 2, 24))
    layer.step([(torch.randn(k.shape), k, k)])
    _, words, k_live, _ = layer.live(0)
    assert torch.equal(k_live, k.transpose(0, 1))
    check_words(words[..., :-1], k_live, policy)


@pytest.mark.parametrize("rule", ["query", "vote"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_quantised_slots_hold_what_was_written_divided_by_its_scale(
    dtype: torch.dtype, rule: str
) -> None:
    torch.manual_seed(0)
    budget, total = 24, 40
    policy = resolve(
        {"budget": budget, "segment": 16, "sinks": 4, "recent": 4, **RULES[rule]}, 16
    )
    layer = TritonLayer(
        policy, [30], [total], 1, 2, 16, 16, torch.float32, cache_dtype=dtype
    )
    k_scale, v_scale = (scale.item() for scale in layer.scales)
    # The interpreter rounds to fp8 in its own way: values that fp8 holds exactly.
    exact = torch.randn(3, total, 2, 16).to(dtype).float()
    q, k, v = exact[0], exact[1, :, :1] * k_scale, exact[2, :, :1] * v_scale
    layer.step([(q[:30], k[:30], v[:30])])
    oracle = ReferenceLayer(policy, 30, 1, 16)
    oracle.forward(q[:30], k[:30], v[:30], SCALE)
    for t in range(30, total):
        row = slice(t, t + 1)
        layer.step([(q[row], k[row], v[row])])
        oracle.forward(q[row], k[row], v[row], SCALE)
    position, words, k_live, v_live = layer.live(0)
    assert torch.equal(position.long(), oracle.slots.position)
    assert torch.equal(k_live.float() * k_scale, oracle.slots.k)
    assert torch.equal(v_live.float() * v_scale, oracle.slots.v)
    if policy.votes:
        known = oracle.slots.position < 30
        check_words(words[..., :-1], oracle.slots.k, policy, known)
    assert layer.untouched()


def test_ties_go_to_the_oldest_position_not_to_the_lowest_slot() -> None:
    policy = resolve({"scoring": "instant", "budget": 20, "sinks": 0, "recent": 0}, 16)
    layer = TritonLayer(policy, [1], [60], 1, 1, 16, 16, torch.float32)
    same = torch.ones(1, 1, 16)
    for _ in range(50):  # equal signatures: every eviction is a tie
        layer.step([(same, same, same)])
    assert layer.live(0)[0][0].tolist() == list(range(30, 50))


def test_nearly_equal_votes_tie_so_that_age_decides() -> None:
    policy = resolve(
        {"scoring": "vote", "hash_bits": 8, "budget": 40, "sinks": 4, "recent": 8}, 16
    )
    layer = TritonLayer(policy, [1], [60], 1, 1, 16, 16, torch.float32)
    tokens = torch.randn(42, 1, 1, 16)
    for token in tokens[:41]:
        layer.step([(token, token, token)])
    older, newer = layer.live(0)[0][0].tolist()[4:6]  # the first beyond the sinks
    position = layer.pages.tail[:, 0, -1]
    votes = layer.pages.tail.view(torch.float32)[:, 0, -2]
    votes[:] = 2.0
    votes[position == newer] = 1.0
    votes[position == older] = 1.0 + 2.0**-20  # a rounding error more
    layer.step([(tokens[41], tokens[41], tokens[41])])  # 41 casts no ballot
    kept = layer.live(0)[0][0].tolist()
    assert older not in kept
    assert newer in kept


@pytest.mark.parametrize("rule", ["query", "vote"])
@pytest.mark.parametrize("padding", [0, 3])
def test_an_empty_batch_leaves_every_byte_as_it_is(rule: str, padding: int) -> None:
    policy = resolve(
        {"budget": 23, "segment": 16, "sinks": 4, "recent": 3, **RULES[rule]}, 16
    )
    layer = TritonLayer(policy, [9], [60], 1, 1, 16, 16, torch.float32)
    none = torch.empty(0, 1, 16)
    layer.computed = [40]
    layer.step([(none, none, none)], padding)
    rows = (torch.ones(padding, 1, 16),) * 3
    lens = [40] + [0] * padding  # nothing is scheduled, and yet a round is asked for
    layer._rounds([True], len(lens), padding, [0] * (len(lens) + 1), lens, *rows)
    assert bool((layer.buffer == POISON).all())
