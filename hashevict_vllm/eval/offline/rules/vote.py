"""Our own default rule, and what its hashing costs: other estimates, all else equal."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch

from hashevict_vllm.config import KVPolicyConfig
from hashevict_vllm.eval.offline.model import PromptLayer
from hashevict_vllm.eval.offline.rules.base import Rule
from hashevict_vllm.eval.offline.slots import Slots, Step
from hashevict_vllm.eval.rule_digest import rule_digest
from hashevict_vllm.kernels.codes import NEIGHBOURS
from hashevict_vllm.kernels.projection import make_projection
from hashevict_vllm.kernels.signature import signature_bits
from hashevict_vllm.policies.base import LiveSlots
from hashevict_vllm.policies.frame import KeyFrame
from hashevict_vllm.policies.vote import Vote, estimate_scale


class ExactVote(Vote):
    """The exact logit, which is the exact cosine times both norms."""

    def dot_products(
        self, q: torch.Tensor, k: torch.Tensor, projection: torch.Tensor
    ) -> torch.Tensor:
        """See `Vote.dot_products`."""
        return q @ k.transpose(1, 2)


class CosineVote(Vote):
    """The exact cosine; every key counts with the mean norm: what key norms are worth.

    Cosine times norms would be `ExactVote`.
    """

    def dot_products(
        self, q: torch.Tensor, k: torch.Tensor, projection: torch.Tensor
    ) -> torch.Tensor:
        """See `Vote.dot_products`."""
        k = k - KeyFrame.of(k, self.policy.sinks).centre[:, None].float()
        norm = k.norm(dim=-1, keepdim=True)
        unit = k / norm.clamp_min(1e-12)
        return q @ unit.transpose(1, 2) * norm.mean(1, keepdim=True)


class WholeVote(Vote):
    """Keys are centred and hashed whole: what coordinates along axes are worth."""

    def dot_products(
        self, q: torch.Tensor, k: torch.Tensor, projection: torch.Tensor
    ) -> torch.Tensor:
        """See `Vote.dot_products`."""
        k = k - KeyFrame.of(k, self.policy.sinks).centre[:, None].float()
        signs = signature_bits(k, projection).float() * 2 - 1
        c = estimate_scale(
            self.policy.hash_bits, q.shape[-1], orthogonal=self.policy.orthogonal
        )
        estimates = (q @ projection) @ signs.transpose(1, 2) * c
        return estimates * k.norm(dim=-1)[:, None]


class HammingVote(Vote):
    """Of the rests, signatures of both sides: |q| |k| cos(pi h / b).

    h is their Hamming distance; what lies along the frame's axes is kept.
    """

    def dot_products(
        self, q: torch.Tensor, k: torch.Tensor, projection: torch.Tensor
    ) -> torch.Tensor:
        """See `Vote.dot_products`."""
        frame = KeyFrame.of(k, self.policy.sinks)
        described, (along, rest) = frame.describe(k), frame.split(q)
        pair = (rest, described.rest)
        ours, theirs = (signature_bits(x, projection).float() * 2 - 1 for x in pair)
        agree = ours @ theirs.transpose(1, 2) / projection.shape[1]
        cosine = torch.cos(math.pi * (1 - agree) / 2)
        norms = rest.norm(dim=-1)[..., None] * described.length[:, None]
        return along @ described.along.transpose(1, 2) + cosine * norms


class VoteRule(Rule):
    """The served default, for prompts that are held until their end.

    The votes are the policy's own code, and so are the victims.

    Args:
        budget: C.
        seed: Seed of the projection.

    """

    label = "vote (offline)"
    vote: ClassVar[type[Vote]] = Vote

    def __init__(self, budget: int, seed: int = 0) -> None:
        super().__init__(budget)
        choice = {"name": "hashevict", "scoring": "vote", "segment": "prompt"}
        config = KVPolicyConfig.from_dict({**choice, "seed": seed, "budget": budget})
        # No prompt is longer than this; a block of 16 lets small budgets pass.
        self.policy = config.resolve(max_model_len=1 << 20, block_size=16)
        self.rule = self.vote(self.policy)

    @property
    def options(self) -> dict[str, Any]:
        """The policy's as well."""
        return {**super().options, "policy": dataclasses.asdict(self.policy)}

    @property
    def digest(self) -> str | None:
        """The served rule's."""
        return rule_digest(dataclasses.asdict(self.policy))

    @property
    def recent(self) -> int:
        """The policy's share of the budget."""
        return self.policy.recent

    def projection(self, head_dim: int) -> torch.Tensor:
        """The projection [D, b]."""
        bits = self.rule.projected_bits
        return make_projection(head_dim, bits, self.policy.seed, self.policy.orthogonal)

    def judge(self, prompt: PromptLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """Votes of the last queries, and merit, as in `Vote.survivors`.

        Budgets share the votes; credit for values depends on the budget, and so does
        what is protected.
        """
        position = torch.arange(len(prompt)).expand(len(prompt.k), -1)
        voters = self.policy.voters(0, len(prompt), len(prompt))
        name = (self.label, self.policy.seed, voters)
        if name not in prompt.memo:
            prompt.memo[name] = self._votes(prompt, position, voters)
        votes = merit = prompt.memo[name]
        if len(prompt) > self.budget:
            merit = self.rule.merit(position, votes, prompt.v, goes_on=False)
            votes = torch.maximum(votes, NEIGHBOURS * merit)
        score = merit.clone()
        score[self.rule.protected(position, len(prompt))] = float("inf")
        return votes, score

    def _votes(
        self, prompt: PromptLayer, position: torch.Tensor, voters: range
    ) -> torch.Tensor:
        """Votes float32 [Hkv, T] that the policy's code counts."""
        none = torch.empty(*position.shape, 0, dtype=torch.bool)
        zeros = torch.zeros(position.shape)
        slots = LiveSlots(prompt.k, prompt.v, none, position, zeros)
        projection = self.projection(prompt.k.shape[-1])
        for i in voters:
            earlier = slots.first(i)
            self.rule.vote(prompt.q[:, :, i], earlier, projection, prompt.scale, False)
        return slots.votes

    def after(self, slots: Slots, weights: torch.Tensor, step: Step) -> None:
        """Ballot, every ``vote_every`` tokens, on all slots but the token's own."""
        if self.policy.voters(step.t, step.t + 1, step.prompt_len):
            live, r = live_slots(slots), self.projection(slots.k.shape[-1])
            others = live.position != step.t
            rest = live.without((~others).int().argmax(1))
            self.rule.vote(step.q.flatten(0, 1), rest, r, step.scale, True)
            live.votes[others] = rest.votes.flatten()
            slots.stat.copy_(live.votes.view_as(slots.stat))

    def victims(self, slots: Slots, step: Step) -> torch.Tensor:
        """The policy's own victims: votes are all that its score reads."""
        none = torch.empty(0)
        victim = self.rule.victim(none, none, live_slots(slots), step.t)
        return victim.view(slots.stat.shape[:2])


def live_slots(slots: Slots) -> LiveSlots:
    """The same slots as the policy knows them: R × Hkv heads, no signatures."""
    fields = (slots.k, slots.v, slots.position, slots.stat)
    k, v, position, stat = (field.flatten(0, 1) for field in fields)
    return LiveSlots(k, v, k.new_empty(*k.shape[:2], 0).bool(), position, stat)


class ExactVoteRule(VoteRule):
    """What hashing costs: the same votes by exact logits."""

    label = "vote, exact logits (offline)"
    vote = ExactVote


class CosineVoteRule(VoteRule):
    """The same votes by exact cosines, without the keys' norms."""

    label = "vote, exact cosine (offline)"
    vote = CosineVote


class WholeVoteRule(VoteRule):
    """The same votes from signatures of whole keys and their norms."""

    label = "vote, keys hashed whole (offline)"
    vote = WholeVote


class HammingVoteRule(VoteRule):
    """The same votes by Hamming distances: the query is hashed as well."""

    label = "vote, Hamming (offline)"
    vote = HammingVote
