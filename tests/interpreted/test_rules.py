"""The Triton kernels keep the same slots as the oracle, over many requests and steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracle import resolve
from support.paged_triton import LAYOUTS, TritonLayer

from hashevict_vllm.kernels.signature import pack_bits
from hashevict_vllm.policies.reference import ReferenceLayer

# bfloat16 is left out: the interpreter computes with its bits as with integers.
DTYPES = (torch.float32, torch.float16)


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
        if prompts[i]:
            oracle.forward(q[: prompts[i]], k[: prompts[i]], v[: prompts[i]], 1.0)
        for t in range(prompts[i], totals[i]):
            oracle.forward(q[t : t + 1], k[t : t + 1], v[t : t + 1], 1.0)
        position, words, k_live, v_live = layer.live(i)
        assert torch.equal(position.long(), oracle.slots.position)
        if oracle.rule.projected_bits:
            packed = pack_bits(oracle.slots.bits)
            assert torch.equal(words[..., : packed.shape[-1]], packed)
        if resolved.votes:
            votes = words[..., -1:].contiguous().view(torch.float32)[..., 0]
            torch.testing.assert_close(votes, oracle.slots.votes)
        assert torch.equal(k_live.float(), oracle.slots.k)
        assert torch.equal(v_live.float(), oracle.slots.v)
    assert layer.untouched()


@pytest.mark.parametrize("name", ["hashevict", "streaming_llm", "l2_norm", "random"])
@pytest.mark.parametrize("segment", [1, 32])
def test_kernels_equal_the_oracle_for_every_replayed_rule(
    name: str, segment: int
) -> None:
    options = {"scoring": "instant"} if name == "hashevict" else {}
    run(
        {"name": name, "budget": 30, "segment": segment, "recent": 4, "seed": 3}
        | options,
        prompts=[50, 9, 40],
        outputs=12,
        chunk=25,
    )


@pytest.mark.parametrize("segment", [1, 32, "prompt"])
def test_kernels_equal_the_oracle_for_votes(segment: int | str) -> None:
    run(
        {"scoring": "vote", "budget": 30, "segment": segment, "recent": 6, "window": 4},
        prompts=[50, 9, 40],
        outputs=8,
        chunk=25,
    )
