"""The served policies offline, run by the oracle's own code.

For attention fidelity; their answers are the engine's business.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from hashevict_vllm.config import KVPolicyConfig
from hashevict_vllm.eval.offline.model import PromptLayer
from hashevict_vllm.eval.offline.rules.base import Rule, no_flags
from hashevict_vllm.eval.offline.slots import Kept, Slots, Step
from hashevict_vllm.kernels.projection import make_projection
from hashevict_vllm.kernels.signature import signature_bits
from hashevict_vllm.policies import make_rule
from hashevict_vllm.policies.base import EvictionRule, LiveSlots


class PolicyRule(Rule):
    """A served policy whose prompts are held until their end.

    Args:
        budget: C.
        seed: Seed of the projection.

    Attributes:
        choice: Keys of `KVPolicyConfig`.
        hashes: Whether results depend on the projection.

    """

    choice: ClassVar[dict[str, Any]]
    hashes: ClassVar[bool] = False

    def __init__(self, budget: int, seed: int = 0) -> None:
        super().__init__(budget)
        options = {**self.choice, "segment": "prompt", "seed": seed, "budget": budget}
        config = KVPolicyConfig.from_dict(options)
        # No prompt is longer than this; a block of 16 lets small budgets pass.
        self.policy = config.resolve(max_model_len=1 << 20, block_size=16)
        self.rule = self.make()

    def make(self) -> EvictionRule:
        """The policy's rule."""
        return make_rule(self.policy)

    @property
    def options(self) -> dict[str, Any]:
        """The policy's as well."""
        return {**super().options, "policy": dataclasses.asdict(self.policy)}

    @property
    def recent(self) -> int:
        """The policy's share of the budget."""
        return self.policy.recent

    def projection(self, head_dim: int) -> torch.Tensor:
        """The projection [D, b]; b is 0 for policies that hash nothing."""
        policy, bits = self.policy, self.rule.projected_bits
        return make_projection(head_dim, bits, policy.seed, policy.orthogonal)

    def judge(
        self, prompt: PromptLayer
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Not used where `keep` replays the decode rule."""
        raise NotImplementedError

    def keep(self, prompt: PromptLayer) -> Kept:
        """Replay the decode rule for the prompt's tokens, each with its own query."""
        count, n = min(self.budget, len(prompt)), len(prompt)
        r = self.projection(prompt.k.shape[-1])
        q_bits, k_bits = signature_bits(prompt.q, r), signature_bits(prompt.k, r)
        fields = (prompt.k, prompt.v, k_bits, torch.arange(n).expand(len(k_bits), -1))
        zeros = torch.zeros(prompt.k.shape[:2])
        whole = LiveSlots(*fields, zeros)
        live = LiveSlots(*(field[:, :count].clone() for field in vars(whole).values()))
        heads = torch.arange(len(k_bits))
        for t in range(count, n):
            victim = self.rule.victim(q_bits[:, :, t], k_bits[:, t], live, t)
            for mine, all_of_them in zip(
                vars(live).values(), vars(whole).values(), strict=True
            ):
                mine[heads, victim] = all_of_them[:, t]
        index = live.position.sort(-1).values
        return Kept(index, zeros.gather(1, index), no_flags(prompt))

    def victims(self, slots: Slots, step: Step) -> torch.Tensor:
        """The policy's own victims."""
        r = self.projection(slots.k.shape[-1])
        q_bits = signature_bits(step.q.flatten(0, 1), r)
        k_bits = signature_bits(step.k.flatten(0, 1), r)
        victim = self.rule.victim(q_bits, k_bits, live_slots(slots, r), step.t)
        return victim.view(slots.stat.shape[:2])


def live_slots(slots: Slots, projection: torch.Tensor | None) -> LiveSlots:
    """The same slots as the policies know them: R × Hkv heads.

    Signed anew by a projection [D, b]; None for code that reads no signatures.
    """
    k = slots.k.flatten(0, 1)
    if projection is None:
        projection = k.new_empty(k.shape[-1], 0)
    return LiveSlots(
        k,
        slots.v.flatten(0, 1),
        signature_bits(k, projection),
        slots.position.flatten(0, 1),
        slots.stat.flatten(0, 1),
    )


class Paper(PolicyRule):
    """HashEvict as published: query–key Hamming distance, 16 bits."""

    label = "paper (offline)"
    choice: ClassVar[dict[str, Any]] = {"name": "hashevict", "preset": "paper"}
    hashes = True


class Reference(PolicyRule):
    """HashEvict's released code: key–key Hamming distance, 16 bits."""

    label = "reference (offline)"
    choice: ClassVar[dict[str, Any]] = {"name": "hashevict", "preset": "reference"}
    hashes = True


class StreamingLLM(PolicyRule):
    """Sinks and the most recent tokens."""

    label = "streaming_llm (offline)"
    choice: ClassVar[dict[str, Any]] = {"name": "streaming_llm"}


class L2Norm(PolicyRule):
    """Keys of small norm."""

    label = "l2_norm (offline)"
    choice: ClassVar[dict[str, Any]] = {"name": "l2_norm"}


class KeyDiff(PolicyRule):
    """Keys that differ from the mean."""

    label = "key_diff (offline)"
    choice: ClassVar[dict[str, Any]] = {"name": "key_diff"}


class Random(PolicyRule):
    """The floor."""

    label = "random (offline)"
    choice: ClassVar[dict[str, Any]] = {"name": "random"}
