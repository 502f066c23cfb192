"""Live slots of one layer: many rules of one budget, many sequences each, in one step.

Decoding all of them together makes a comparison of ten rules cost little more than one:
the weights of the model are read once per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hashevict_vllm.eval.offline.rules.base import Rule


@dataclass
class Slots:
    """n live slots of R sequences, for one rule; views that a step writes to.

    Attributes:
        k: float32 [R, Hkv, n, D], keys after RoPE.
        v: float32 [R, Hkv, n, D].
        position: int64 [R, Hkv, n], distinct in each row. Sinks come first, in order:
            a new token overwrites its victim.
        stat: float32 [R, Hkv, n], what the rule keeps of every slot.
        flag: bool [R, Hkv], what the rule decided of every head.

    """

    k: torch.Tensor
    v: torch.Tensor
    position: torch.Tensor
    stat: torch.Tensor
    flag: torch.Tensor


@dataclass(frozen=True)
class Kept:
    """What a rule keeps of one layer of a prompt.

    Attributes:
        index: int64 [Hkv, n], positions, ascending.
        stat: float32 [Hkv, n].
        flag: bool [Hkv].

    """

    index: torch.Tensor
    stat: torch.Tensor
    flag: torch.Tensor

    def slots(self, k: torch.Tensor, v: torch.Tensor) -> Slots:
        """The slots, R = 1, of a prompt's k and v [Hkv, T, D]."""
        at = self.index[..., None].expand(-1, -1, k.shape[-1])
        fields = (k.gather(1, at), v.gather(1, at), self.index, self.stat, self.flag)
        return Slots(*(field[None] for field in fields))


@dataclass(frozen=True)
class Step:
    """One new token of R sequences, as a rule sees it before attention.

    Attributes:
        q: float32 [R, Hkv, G, D].
        k: float32 [R, Hkv, D].
        t: Its position.
        prompt_len: Length of the prompt.
        scale: Softmax scale.

    """

    q: torch.Tensor
    k: torch.Tensor
    t: int
    prompt_len: int
    scale: float


class Slab:
    """The slots of several rules that have the same budget.

    Args:
        rules: P rules.
        kept: Their slots after the prompt, [R, Hkv, n, ...] each, n the same.
        capacity: Slots per KV head.
        prompt_len: Length of the prompt.

    """

    def __init__(
        self,
        rules: Sequence[Rule],
        kept: Sequence[Slots],
        capacity: int,
        prompt_len: int,
    ) -> None:
        self.rules, self.capacity, self.prompt_len = rules, capacity, prompt_len
        self.n = kept[0].k.shape[2]

        def room(name: str) -> torch.Tensor:
            live = torch.stack([getattr(slots, name) for slots in kept])
            whole = live.new_zeros(*live.shape[:3], capacity, *live.shape[4:])
            whole[:, :, :, : self.n] = live
            return whole

        self.k, self.v, self.position, self.stat = map(
            room, ("k", "v", "position", "stat")
        )
        self.flag = torch.stack([slots.flag for slots in kept])
        self._fresh = torch.tensor([rule.fresh for rule in rules])[:, None, None, None]
        self._views: tuple[int, list[Slots]] = (-1, [])

    def slots(self) -> list[Slots]:
        """The live slots of every rule; the same views while their number stays."""
        if self._views[0] != self.n:
            self._views = self.n, [self._slots_of(i) for i in range(len(self.rules))]
        return self._views[1]

    def _slots_of(self, rule: int) -> Slots:
        n = self.n
        return Slots(
            self.k[rule, :, :, :n],
            self.v[rule, :, :, :n],
            self.position[rule, :, :, :n],
            self.stat[rule, :, :, :n],
            self.flag[rule],
        )

    def step(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, t: int, scale: float
    ) -> torch.Tensor:
        """Append or evict, then attend: one token of every sequence at position t.

        Args:
            q: float32 [P, R, Hkv, G, D].
            k: float32 [P, R, Hkv, D].
            v: float32 [P, R, Hkv, D].
            t: Position.
            scale: Softmax scale.

        Returns:
            float32 [P, R, Hkv, G, D].

        """
        full = self.n == self.capacity
        steps = [
            Step(q[i], k[i], t, self.prompt_len, scale) for i in range(len(self.rules))
        ]
        slot = torch.full(k.shape[:3], self.n)
        for i, (rule, slots) in enumerate(zip(self.rules, self.slots(), strict=True)):
            if full:
                slot[i] = rule.victims(slots, steps[i])
        if not full:
            self.n += 1
        self._write(slot, k, v, t)
        n = self.n
        logits = q @ self.k[..., :n, :].transpose(-1, -2)
        weights = logits.mul_(scale).softmax(-1)
        for i, (rule, slots) in enumerate(zip(self.rules, self.slots(), strict=True)):
            rule.after(slots, weights[i], steps[i])
        return weights @ self.v[..., :n, :]

    def _write(
        self, slot: torch.Tensor, k: torch.Tensor, v: torch.Tensor, t: int
    ) -> None:
        """Put the token at position t into the slots ``slot`` [P, R, Hkv]."""
        at = slot[..., None]
        wide = at[..., None].expand(*at.shape, k.shape[-1])
        self.k.scatter_(3, wide, k[..., None, :])
        self.v.scatter_(3, wide, v[..., None, :])
        self.position.scatter_(3, at, t)
        self.stat.scatter_(3, at, self._fresh.expand(at.shape))
