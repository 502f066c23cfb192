"""How much is timed, and how much memory that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hashevict_vllm.resolved import default_vote_every
from hashevict_vllm.sizing.presets import PRESETS

LLAMA_8B = PRESETS["llama-3.1-8b"]
"""Its ``config.json``: the model of `kernels.triton.cost`."""

LAUNCHES, STOCK = "launches", "stock"

WORKSPACE = 4 << 30
"""Bytes left to vLLM beside weights and cache: activations, CUDA graphs."""


def device_bytes() -> int:
    """Of the GPU's memory, what engines are given: the same for every part."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory * 23 // 25


@dataclass(frozen=True)
class Sizes:
    """What is timed.

    Attributes:
        model: Its ``config.json``.
        dtype: Of weights and cache, as vLLM names it.
        itemsize: Bytes of one of its numbers.
        batches: Requests that decode together.
        budgets: C; prompts and mixed steps are timed with the first.
        segment: S.
        prompt: Tokens of a prompt that is read in one step.
        beside: Requests that decode while it is read, for mixed steps.
        steps: Decode steps that count: whole periods of `every`.
        warm_up: Decode steps before them.
        repeats: Prompts.
        policy: Further options of the policy.
        engine: Further arguments of ``vllm.LLM``.

    """

    model: Mapping[str, Any]
    dtype: str
    itemsize: int
    batches: tuple[int, ...]
    budgets: tuple[int, ...]
    segment: int
    prompt: int
    beside: int
    steps: int
    warm_up: int
    repeats: int
    policy: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        """Processes of the bench, by what they time."""
        return [LAUNCHES, STOCK, *map(str, self.budgets)]

    def every(self, budget: int) -> int:
        """One token of so many votes, at a budget."""
        return self.policy.get("vote_every") or default_vote_every(budget)

    @property
    def chunk(self) -> int:
        """Tokens of a step at most."""
        return max(2 * self.prompt, 256)

    @property
    def decode_tokens(self) -> int:
        """Tokens that a request decodes, at most, until its steps have been timed.

        It decodes while others' prompts are read.
        """
        waits = -(-max(self.batches) * max(self.budgets) // self.chunk)
        return self.warm_up + self.steps + 2 * waits + 8

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(*self.budgets, self.prompt) + self.decode_tokens

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model's weights: projections, MLP, both embeddings."""
        m = self.model
        hidden, kv = m["hidden_size"], m["num_key_value_heads"] * m["head_dim"]
        queries = m["num_attention_heads"] * m["head_dim"]
        layer = hidden * (2 * queries + 2 * kv + 3 * m["intermediate_size"])
        total = layer * m["num_hidden_layers"] + 2 * hidden * m["vocab_size"]
        return int(total * self.itemsize)

    def pool_bytes(self, batch: int, slots: int) -> int:
        """Bytes of a cache for so many requests of so many slots, a tenth to spare."""
        m = self.model
        token = 2 * m["num_hidden_layers"] * m["num_key_value_heads"] * m["head_dim"]
        return int(1.1 * batch * slots * token * self.itemsize)

    def needed_bytes(self, batch: int, slots: int) -> int:
        """Bytes of the device that an engine takes for them."""
        pool = max(self.pool_bytes(batch, slots), self._prompt_pool)
        return self.weight_bytes + pool + WORKSPACE

    @property
    def _prompt_pool(self) -> int:
        """Bytes of a cache for a prompt and the requests that decode beside it."""
        return self.pool_bytes(self.beside + 2, self.longest + self.segment)

    def fitting(self, budget: int, free: int) -> tuple[int, ...]:
        """Batches for which ``free`` bytes of a device are enough."""
        slots = budget + self.decode_tokens
        return tuple(b for b in self.batches if self.needed_bytes(b, slots) <= free)

    def engine_pool(self, free: int) -> int:
        """Bytes of an engine's cache: for everything that fits."""
        needed = [
            self.pool_bytes(batch, budget + self.decode_tokens)
            for budget in self.budgets
            for batch in self.fitting(budget, free)
        ]
        return max([*needed, self._prompt_pool])


ON_GPU = Sizes(
    model=LLAMA_8B,
    dtype="bfloat16",
    itemsize=2,
    batches=(1, 8, 64),
    budgets=(1024, 4096),
    segment=4096,
    prompt=4096,
    beside=8,
    steps=64,
    warm_up=16,
    repeats=7,
)
"""What the issue of the GPU's speed promises figures for."""
