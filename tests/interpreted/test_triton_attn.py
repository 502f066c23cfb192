"""The wrapped TRITON_ATTN, interpreted, gives the oracle's outputs."""

from __future__ import annotations

import pytest
import torch

from hashevict_vllm.policies.reference import ReferenceLayer
from hashevict_vllm.verify.interpreter import allow_triton

allow_triton()

from support.oracle import resolve  # noqa: E402

from hashevict_vllm.verify.layer import WrappedLayer  # noqa: E402

HEADS, GROUP, DIM, SCALE = 1, 2, 32, 32**-0.5


@pytest.mark.parametrize(
    ("scoring", "segment", "dtype", "slots_first"),
    [
        ("instant", 32, torch.float32, False),
        ("instant", 1, torch.float16, True),
        ("vote", "prompt", torch.float32, True),
    ],
)
def test_prefill_mixed_and_decode_batches_equal_the_oracle(
    scoring: str, segment: int | str, dtype: torch.dtype, slots_first: bool
) -> None:
    torch.manual_seed(0)
    policy = resolve(
        {
            "scoring": scoring,
            "budget": 40,
            "segment": segment,
            "sinks": 5,
            "recent": 6,
            "hash_bits": 16,
            **({"window": 4, "vote_every": 2} if scoring == "vote" else {}),
        },
        16,
    )
    prompts, outputs = [60, 12, 45], 3
    layer = WrappedLayer(
        policy, prompts, HEADS, GROUP, DIM, 16, dtype, slots_first, SCALE
    )
    oracles = [ReferenceLayer(policy, prompt, HEADS, DIM) for prompt in prompts]
    streams = [
        tuple(
            torch.randn(prompt + outputs, heads, DIM).to(dtype)
            for heads in (HEADS * GROUP, HEADS, HEADS)
        )
        for prompt in prompts
    ]
    results: list[list[torch.Tensor]] = [[] for _ in prompts]
    decoding_alone = 0
    # A chunk of 25 tokens of each prompt at a time: the short one decodes beside the
    # others' prompts, then all decode.
    while any(layer.computed[i] < len(streams[i][1]) for i in range(3)):
        chunks = []
        for i, (q, k, v) in enumerate(streams):
            start = layer.computed[i]
            end = min(start + 25, prompts[i]) if start < prompts[i] else start + 1
            chunks.append((q[start:end], k[start:end], v[start:end]))
        decoding_alone += all(layer.computed[i] >= prompts[i] for i in range(3))
        for i, output in enumerate(layer.step(chunks)):
            results[i].append(output)
    assert decoding_alone > 0
    tolerance = {"atol": 1e-5, "rtol": 1e-5}
    if dtype == torch.float16:
        tolerance = {"atol": 2e-3, "rtol": 2e-3}
    for i, (q, k, v) in enumerate(streams):
        plen = prompts[i]
        expected = [oracles[i].forward(q[:plen], k[:plen], v[:plen], SCALE)]
        for t in range(plen, plen + outputs):
            row = slice(t, t + 1)
            expected.append(oracles[i].forward(q[row], k[row], v[row], SCALE))
        torch.testing.assert_close(
            torch.cat(results[i]).float(), torch.cat(expected), **tolerance
        )
        positions = oracles[i].slots.position.sort(dim=-1).values
        assert torch.equal(layer.positions(i).long(), positions)
