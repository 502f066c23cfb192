"""The oracle model: transformers in float32 with `ReferenceLayer` as its attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hashevict_vllm.policies.reference import ReferenceLayer
from hashevict_vllm.resolved import ResolvedKVPolicy

_ATTENTION = "hashevict_reference"


class SlidingLayer:
    """Stock sliding-window attention: every token sees the last ``window`` tokens."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.k: list[torch.Tensor] = []
        self.v: list[torch.Tensor] = []

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Q [T, Hq, D], k, v [T, Hkv, D] to [T, Hq, D]."""
        self.k.append(k)
        self.v.append(v)
        group = q.shape[1] // k.shape[1]
        keys = torch.cat(self.k).repeat_interleave(group, dim=1)
        values = torch.cat(self.v).repeat_interleave(group, dim=1)
        at = torch.arange(len(keys))
        age = at[len(keys) - len(q) :, None] - at
        seen = (age >= 0) & (age < self.window)
        logits = torch.einsum("thd,nhd->htn", q, keys) * scale
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("htn,nhd->thd", weights, values)


class Oracle:
    """Greedy decoding with a budgeted cache, one request, no blocks."""

    def __init__(self, model: Path | str) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register(_ATTENTION, self._attention)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.model.set_attn_implementation(_ATTENTION)
        self.layers: dict[int, ReferenceLayer | SlidingLayer] = {}
        self.noise = 0.0

    def _attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        scaling: float,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if self.noise:
            q, k, v = (x * (1 + self.noise * torch.randn_like(x)) for x in (q, k, v))
        return self.layers[module.layer_idx].forward(q, k, v, scaling)[None], None

    @torch.no_grad()
    def greedy(
        self, prompt: list[int], policy: ResolvedKVPolicy, tokens: int = 300
    ) -> list[int]:
        """Greedy continuation of one prompt."""
        config = self.model.config
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        kinds = getattr(config, "layer_types", None)
        self.layers = {
            index: SlidingLayer(config.sliding_window)
            if kinds and kinds[index] == "sliding_attention"
            else ReferenceLayer(
                policy, len(prompt), config.num_key_value_heads, head_dim
            )
            for index in range(config.num_hidden_layers)
        }
        step, position, output = torch.tensor([prompt]), 0, []
        for _ in range(tokens):
            length = step.shape[1]
            # The AttentionInterface is one registry for all oracles of the process.
            logits = self._forward(step, torch.arange(position, position + length))
            position += length
            output.append(int(logits.argmax()))
            step = torch.tensor([[output[-1]]])
        return output

    def is_stable(
        self, prompt: list[int], policy: ResolvedKVPolicy, tokens: int = 300
    ) -> bool:
        """Whether rounding noise leaves the continuation as it is.

        vLLM and transformers differ in q and k by some 2e-6 of their size in float32
        (measured on prompt logprobs). A sign bit near zero may then flip, and where two
        logits nearly tie, so may a token. Exact comparisons use prompts that five times
        that noise does not change in four tries.
        """
        expected = self.greedy(prompt, policy, tokens)
        self.noise = 1e-5
        try:
            torch.manual_seed(0)
            return all(
                self.greedy(prompt, policy, tokens) == expected for _ in range(4)
            )
        finally:
            self.noise = 0.0

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION, self._attention)
        return self.model(
            ids,
            position_ids=positions[None],
            attention_mask={"full_attention": None, "sliding_attention": None},
            use_cache=False,
            logits_to_keep=1,
        ).logits[0, -1]
