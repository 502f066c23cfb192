"""The wrapped xformers backend gives the oracle's outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hashevict_vllm.policies.reference import ReferenceLayer
from hashevict_vllm.verify.interpreter import allow_triton

allow_triton()

from support import xformers_reference  # noqa: E402
from support.oracle import resolve  # noqa: E402

from hashevict_vllm.attention import xformers_calls  # noqa: E402
from hashevict_vllm.attention.xformers_backend import XformersBackend  # noqa: E402
from hashevict_vllm.verify.layer import WrappedLayer  # noqa: E402

DIM, SCALE = 32, 32**-0.5
PROMPTS, OUTPUTS = [60, 12, 45], 3


def policy_of(scoring: str, segment: int | str, budget: int = 40) -> Any:
    votes = {"window": 4, "vote_every": 2} if scoring == "vote" else {}
    keys = {"scoring": scoring, "budget": budget, "segment": segment, "hash_bits": 16}
    return resolve({**keys, "sinks": 5, "recent": 6, **votes}, 16)


class Run:
    """Prompts of several requests, 25 tokens of each at a time, and a few outputs."""

    def __init__(
        self,
        policy: Any,
        heads: int,
        group: int,
        dtype: torch.dtype,
        slots_first: bool = True,
    ) -> None:
        torch.manual_seed(0)
        self.layer = WrappedLayer(
            *(policy, PROMPTS, heads, group, DIM, 16, dtype, slots_first, SCALE),
            inner=XformersBackend,
        )
        self.oracles = [ReferenceLayer(policy, n, heads, DIM) for n in PROMPTS]
        self.streams = [
            tuple(
                torch.randn(prompt + OUTPUTS, count, DIM).to(dtype)
                for count in (heads * group, heads, heads)
            )
            for prompt in PROMPTS
        ]

    def outputs(self) -> list[torch.Tensor]:
        """Of the layer. A short prompt decodes beside long ones, then all decode."""
        results: list[list[torch.Tensor]] = [[] for _ in PROMPTS]
        computed = self.layer.computed
        while any(computed[i] < n + OUTPUTS for i, n in enumerate(PROMPTS)):
            chunks = []
            for start, prompt, stream in zip(
                computed, PROMPTS, self.streams, strict=True
            ):
                end = min(start + 25, prompt) if start < prompt else start + 1
                chunks.append(tuple(x[start:end] for x in stream))
            for result, output in zip(results, self.layer.step(chunks), strict=True):
                result.append(output)
            computed = self.layer.computed
        return [torch.cat(result).float() for result in results]

    def expected(self) -> list[torch.Tensor]:
        """Of the oracle."""
        results = []
        for oracle, prompt, stream in zip(
            self.oracles, PROMPTS, self.streams, strict=True
        ):
            parts = [slice(0, prompt)]
            parts += [slice(t, t + 1) for t in range(prompt, prompt + OUTPUTS)]
            outputs = [oracle.forward(*(x[p] for x in stream), SCALE) for p in parts]
            results.append(torch.cat(outputs))
        return results


@pytest.mark.parametrize(
    ("scoring", "segment", "heads", "group", "dtype", "slots_first", "most"),
    [
        ("instant", 32, 2, 2, torch.float32, True, 50),
        ("vote", "prompt", 1, 3, torch.float32, False, 32768),
        ("instant", 1, 2, 1, torch.float16, True, 32768),
    ],
)
def test_prefill_mixed_and_decode_batches_equal_the_oracle(
    scoring: str,
    segment: int | str,
    heads: int,
    group: int,
    dtype: torch.dtype,
    slots_first: bool,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(xformers_reference.SEAM, xformers_reference.attention)
    monkeypatch.setattr(xformers_calls, "SCRATCH_SLOTS", most)
    run = Run(policy_of(scoring, segment), heads, group, dtype, slots_first)
    close = 1e-5 if dtype == torch.float32 else 2e-3
    for output, expected in zip(run.outputs(), run.expected(), strict=True):
        torch.testing.assert_close(output, expected, atol=close, rtol=close)
    for i, oracle in enumerate(run.oracles):
        positions = oracle.slots.position.sort(dim=-1).values
        assert torch.equal(run.layer.positions(i).long(), positions)
