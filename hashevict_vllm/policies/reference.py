"""The float32 oracle: short, obviously right torch code for a budgeted layer.

Every kernel and the served engine are tested against this file. It keeps the live slots
of one layer of one request in order of arrival and knows nothing of blocks, pages or
chunks. Nothing here is fast.
"""

from __future__ import annotations

import torch

from hashevict_vllm.kernels.projection import make_projection
from hashevict_vllm.kernels.signature import signature_bits
from hashevict_vllm.policies import make_rule
from hashevict_vllm.policies.base import LiveSlots
from hashevict_vllm.resolved import ResolvedKVPolicy


class ReferenceLayer:
    """One layer of one request: its live slots, and the rules that change them.

    Attributes:
        slots: The live slots.
        t: Tokens seen, which is the position of the next one.

    """

    def __init__(
        self,
        policy: ResolvedKVPolicy,
        prompt_len: int,
        num_kv_heads: int,
        head_dim: int,
    ) -> None:
        """An empty layer for a request whose prompt has ``prompt_len`` tokens."""
        self.policy = policy
        self.rule = make_rule(policy)
        self.prompt_len = prompt_len
        self.projection = make_projection(
            head_dim, self.rule.projected_bits, policy.seed, policy.orthogonal
        )
        self.t = 0
        none = torch.empty(0, num_kv_heads, head_dim)
        self.slots = self._new_slots(none, none)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of the next T tokens; the live slots are updated.

        Args:
            q: [T, Hq, D] after RoPE.
            k: [T, Hkv, D] after RoPE.
            v: [T, Hkv, D].
            scale: Softmax scale.

        Returns:
            float32 [T, Hq, D]. A prompt must be given whole: how a scheduler cuts it is
            what the result does not depend on.

        """
        q, k, v = (x.to(torch.float32) for x in (q, k, v))
        outputs = []
        start, total = self.t, self.t + len(q)
        while self.t < total:
            first = self.t - start
            if self.t < self.prompt_len and self.policy.segment > 1:
                end = (self.t // self.policy.segment + 1) * self.policy.segment
                rows = slice(first, min(end, self.prompt_len) - start)
                outputs.append(self._segment(q[rows], k[rows], v[rows], scale))
            else:
                rows = slice(first, first + 1)
                outputs.append(self._decode(q[rows], k[rows], v[rows], scale))
        return torch.cat(outputs)

    def _decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Design 1.2: evict before attention, attend, then vote. q [1, Hq, D]."""
        t = self.t
        if len(self.slots) == self.policy.budget:
            self._evict(q[0], k[0], t, self.policy.budget)
        self._append(k, v)
        output = self._attend(q, scale)
        # On the slots that it found: its own came last.
        self._vote(q[0], t, len(self.slots) - 1, scale, decode=True)
        return output

    def _segment(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Design 1.3: attend with the segment held, vote, then reduce."""
        start, arrived = self.t, len(self.slots)
        self._append(k, v)
        output = self._attend(q, scale)
        for i in range(len(q)):
            self._vote(q[i], start + i, arrived + i, scale, decode=False)
        if len(self.slots) > self.policy.budget:
            goes_on = self.t < self.prompt_len
            survivors = self.rule.survivors(self.slots, self.t, goes_on)
            if survivors is not None:
                self.slots = self.slots.only(survivors)
                return output
        for i in range(len(q)):
            if arrived == self.policy.budget:
                # Later tokens of the segment have not arrived yet in the replay.
                self._evict(q[i], k[i], start + i, arrived)
            else:
                arrived += 1
        return output

    def _vote(
        self, q: torch.Tensor, t: int, arrived: int, scale: float, decode: bool
    ) -> None:
        """Let the query (q [Hq, D]) at position t vote on the slots before it."""
        if self.policy.voters(t, t + 1, self.prompt_len):
            grouped = q.unflatten(0, (self.slots.k.shape[0], -1))
            slots = self.slots.first(arrived)
            self.rule.vote(grouped, slots, self.projection, scale, decode)

    def _evict(self, q: torch.Tensor, k: torch.Tensor, t: int, arrived: int) -> None:
        """Drop the victim of the token (q [Hq, D], k [Hkv, D]) at position t."""
        q_bits = signature_bits(q, self.projection).unflatten(0, (k.shape[0], -1))
        k_bits = signature_bits(k, self.projection)
        victim = self.rule.victim(q_bits, k_bits, self.slots.first(arrived), t)
        self.slots = self.slots.without(victim)

    def _new_slots(self, k: torch.Tensor, v: torch.Tensor) -> LiveSlots:
        position = torch.arange(self.t, self.t + len(k)).expand(k.shape[1], -1)
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        bits = signature_bits(k, self.projection)
        return LiveSlots(k, v, bits, position, torch.zeros(k.shape[:2]))

    def _append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.slots = self.slots.append(self._new_slots(k, v))
        self.t += len(k)

    def _attend(self, q: torch.Tensor, scale: float) -> torch.Tensor:
        """Softmax attention of the last T tokens, causal by order of arrival."""
        n, group = len(self.slots), q.shape[1] // self.slots.k.shape[0]
        k = self.slots.k.repeat_interleave(group, dim=0)
        v = self.slots.v.repeat_interleave(group, dim=0)
        mask = torch.ones(len(q), n, dtype=torch.bool).tril(n - len(q))
        logits = torch.einsum("thd,hnd->htn", q, k) * scale
        weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
        return torch.einsum("htn,hnd->thd", weights, v)
