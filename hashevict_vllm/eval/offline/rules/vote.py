"""Our own default rule, and what its hashing costs: other estimates, all else equal."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from hashevict_vllm.eval.offline.model import PromptLayer
from hashevict_vllm.eval.offline.rules.base import Rule, no_flags
from hashevict_vllm.eval.offline.rules.policy import PolicyRule, live_slots
from hashevict_vllm.eval.offline.slots import Kept, Slots, Step
from hashevict_vllm.kernels.signature import signature_bits
from hashevict_vllm.policies.base import LiveSlots
from hashevict_vllm.policies.frame import KeyFrame
from hashevict_vllm.policies.vote import NEIGHBOURS, Vote, estimate_scale


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


class VoteRule(PolicyRule):
    """The served default; its prompts are judged by votes instead of a replay."""

    label = "vote (offline)"
    choice: ClassVar[dict[str, Any]] = {"name": "hashevict", "scoring": "vote"}
    vote: ClassVar[type[Vote]] = Vote
    hashes = True
    rule: Vote

    def make(self) -> Vote:
        """The rule with this class's estimate."""
        return self.vote(self.policy)

    def keep(self, prompt: PromptLayer) -> Kept:
        """One selection."""
        return Rule.keep(self, prompt)

    def judge(
        self, prompt: PromptLayer
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Votes of the prompt's last queries, and the same pooled; as `Vote.survivors`.

        Budgets share them; what is protected depends on the budget.
        """
        position = torch.arange(len(prompt)).expand(len(prompt.k), -1)
        voters = self.policy.voters(0, len(prompt), len(prompt))
        reduced = len(prompt) > self.budget
        name = (self.label, self.policy.seed, voters, reduced)
        if name not in prompt.memo:
            votes = self._votes(prompt, position, voters)
            pooled = self.rule._pooled(position, votes) if reduced else votes
            votes = torch.maximum(votes, NEIGHBOURS * pooled)
            prompt.memo[name] = torch.stack([votes, pooled])
        votes, pooled = prompt.memo[name]
        score = pooled.clone()
        score[:, : self.policy.sinks] = float("inf")
        score[:, max(0, len(prompt) - self.recent) :] = float("inf")
        return votes, score, no_flags(prompt)

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
            live, r = live_slots(slots, None), self.projection(slots.k.shape[-1])
            others = live.position != step.t
            rest = live.without((~others).int().argmax(1))
            self.rule.vote(step.q.flatten(0, 1), rest, r, step.scale, True)
            live.votes[others] = rest.votes.flatten()
            slots.stat.copy_(live.votes.view_as(slots.stat))

    def victims(self, slots: Slots, step: Step) -> torch.Tensor:
        """The policy's own victims: votes are all that its score reads."""
        none = torch.empty(0)
        victim = self.rule.victim(none, none, live_slots(slots, None), step.t)
        return victim.view(slots.stat.shape[:2])


class ExactVoteRule(VoteRule):
    """What hashing costs: the same votes by exact logits."""

    label = "vote, exact logits (offline)"
    vote = ExactVote
    hashes = False


class CosineVoteRule(VoteRule):
    """The same votes by exact cosines, without the keys' norms."""

    label = "vote, exact cosine (offline)"
    vote = CosineVote
    hashes = False


class WholeVoteRule(VoteRule):
    """The same votes from signatures of whole keys and their norms."""

    label = "vote, keys hashed whole (offline)"
    vote = WholeVote


class HammingVoteRule(VoteRule):
    """The same votes by Hamming distances: the query is hashed as well."""

    label = "vote, Hamming (offline)"
    vote = HammingVote
