"""The Triton kernels find a victim whatever bits keys, values and queries hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.oracle import resolve
from support.paged_triton import SCALE, TritonLayer

from hashevict_vllm.policies.reference import ReferenceLayer

DIM, HEADS, GROUP = 16, 1, 2
NAN, INF = float("nan"), float("inf")
RULES: dict[str, dict[str, Any]] = {
    "query": {"scoring": "instant"},
    "key": {"scoring": "instant", "hash_source": "key"},
    "vote": {"scoring": "vote", "window": 4, "hash_bits": 16, "vote_every": 4},
    "recency": {"name": "streaming_llm"},
    "norm": {"name": "l2_norm"},
    "random": {"name": "random"},
}


def random_bits(rows: int, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, heads, D], one row in two normal numbers, else any bits of the dtype."""
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(integer)
    x = torch.randint(info.min, info.max, (rows, heads, DIM)).to(integer).view(dtype)
    return torch.where(torch.rand(rows, heads, 1) < 0.5, x, torch.randn(x.shape)).to(
        dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("segment", [1, 32])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_bits_leave_the_budget_and_the_protected_slots(
    rule: str, segment: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    policy = resolve(
        {**RULES[rule], "budget": 40, "segment": segment, "sinks": 4, "recent": 5}, 16
    )
    prompt, total = (60, 63) if segment > 1 else (1, 50)
    layer = TritonLayer(policy, [prompt], [total], HEADS, GROUP, DIM, 16, dtype)
    q, k, v = (random_bits(total, n, dtype) for n in (GROUP, HEADS, HEADS))
    layer.step([(q[:prompt], k[:prompt], v[:prompt])])
    for t in range(prompt, total):
        layer.step([(q[t : t + 1], k[t : t + 1], v[t : t + 1])])
    position, words, _, _ = layer.live(0)
    kept = position[0].tolist()
    assert len(set(kept)) == len(kept) == 40
    assert {*range(4), *range(total - 5, total)} <= set(kept)
    assert max(kept) < total
    if rule == "vote":
        votes = words[..., -1:].contiguous().view(torch.float32)
        assert bool(votes.isfinite().all())
    assert layer.untouched()


@pytest.mark.parametrize(
    ("rule", "sinks"),
    [
        ("norm", {}),
        ("vote", {}),
        ("vote", {0: NAN, 2: INF}),
        ("vote", {0: INF, 2: NAN}),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_keys_that_are_not_finite_are_ranked_as_the_oracle_ranks_them(
    rule: str, sinks: dict[int, float]
) -> None:
    torch.manual_seed(1)
    protected = {"sinks": 4, "recent": 5}
    policy = resolve({**RULES[rule], "budget": 40, "segment": 32, **protected}, 16)
    q, k, v = (torch.randn(64, n, DIM) for n in (GROUP, HEADS, HEADS))
    k[25, 0, 3], k[29, 0, 0] = NAN, -INF
    if rule == "norm":  # a finite key whose logits are not depends on the order of sums
        k[35, 0, 7] = 3e38
    k[33] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # a NaN's sign set
    for position, value in sinks.items():
        k[position, 0, position] = value
    layer = TritonLayer(policy, [64], [64], HEADS, GROUP, DIM, 16, torch.float32)
    layer.step([(q, k, v)])
    oracle = ReferenceLayer(policy, 64, HEADS, DIM)
    oracle.forward(q, k, v, SCALE)
    assert torch.equal(layer.live(0)[0].long(), oracle.slots.position.sort().values)
