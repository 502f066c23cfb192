"""A wrapped layer and the oracle, through prefill, mixed and decode batches."""

from __future__ import annotations

from typing import Any

import torch

from hashevict_vllm.policies.reference import ReferenceLayer
from hashevict_vllm.verify.layer import WrappedLayer
from support.oracle import resolve

DIM, SCALE = 32, 32**-0.5
PROMPTS, OUTPUTS = [60, 12, 45], 3


def policy_of(scoring: str, segment: int | str, budget: int = 40) -> Any:
    """A policy that evicts from the two long prompts."""
    votes = {"window": 4, "vote_every": 2} if scoring == "vote" else {}
    keys = {"scoring": scoring, "budget": budget, "segment": segment, "hash_bits": 16}
    return resolve({**keys, "sinks": 5, "recent": 6, **votes}, 16)


class Run:
    """Prompts of several requests, 25 tokens of each at a time, then outputs."""

    def __init__(
        self,
        policy: Any,
        heads: int,
        group: int,
        dtype: torch.dtype,
        slots_first: bool,
        prompts: list[int] = PROMPTS,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.prompts = prompts
        self.layer = WrappedLayer(
            *(policy, prompts, heads, group, DIM, 16, dtype, slots_first, SCALE),
            **options,
        )
        self.oracles = [ReferenceLayer(policy, n, heads, DIM) for n in prompts]
        self.streams = [
            tuple(
                torch.randn(prompt + OUTPUTS, count, DIM).to(dtype)
                for count in (heads * group, heads, heads)
            )
            for prompt in prompts
        ]
        self.tolerance = 1e-5 if dtype == torch.float32 else 2e-3

    def _outputs(self) -> list[torch.Tensor]:
        results: list[list[torch.Tensor]] = [[] for _ in self.prompts]
        decoding_alone = 0
        # The short prompt decodes beside the long ones, then all decode.
        while any(
            n < len(s[1])
            for n, s in zip(self.layer.computed, self.streams, strict=True)
        ):
            chunks: Any = []
            computed = self.layer.computed
            for start, prompt, stream in zip(
                computed, self.prompts, self.streams, strict=True
            ):
                end = min(start + 25, prompt) if start < prompt else start + 1
                chunks.append(tuple(x[start:end] for x in stream))
            decoding_alone += all(
                n >= p for n, p in zip(computed, self.prompts, strict=True)
            )
            for result, output in zip(results, self.layer.step(chunks), strict=True):
                result.append(output)
        assert decoding_alone > 0
        return [torch.cat(result).float() for result in results]

    def _expected(self) -> list[torch.Tensor]:
        results = []
        for oracle, prompt, stream in zip(
            self.oracles, self.prompts, self.streams, strict=True
        ):
            parts = [slice(0, prompt)]
            parts += [slice(t, t + 1) for t in range(prompt, prompt + OUTPUTS)]
            outputs = [oracle.forward(*(x[p] for x in stream), SCALE) for p in parts]
            results.append(torch.cat(outputs))
        return results

    def check(self) -> None:
        """Outputs are the oracle's, and so are the slots that live in the end."""
        close = {"atol": self.tolerance, "rtol": self.tolerance}
        for output, expected in zip(self._outputs(), self._expected(), strict=True):
            torch.testing.assert_close(output, expected, **close)
        for i, oracle in enumerate(self.oracles):
            positions = oracle.slots.position.sort(dim=-1).values
            assert torch.equal(self.layer.positions(i).long(), positions)
