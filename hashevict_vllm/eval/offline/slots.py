"""Live slots of one layer: one rule, several sequences side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Slots:
    """n live slots of R sequences, in no order: a new token overwrites its victim.

    Attributes:
        k: float32 [R, Hkv, n, D], keys after RoPE.
        v: float32 [R, Hkv, n, D].
        position: int64 [R, Hkv, n], distinct in each row.
        stat: float32 [R, Hkv, n], what the rule keeps of every slot.
        seen: float32 [R, Hkv, w, n], attention by the last w queries, the newest last;
            w is 0 for rules that do not look at it.

    """

    k: torch.Tensor
    v: torch.Tensor
    position: torch.Tensor
    stat: torch.Tensor
    seen: torch.Tensor

    def __len__(self) -> int:
        return self.position.shape[-1]

    @classmethod
    def chosen(
        cls,
        k: torch.Tensor,
        v: torch.Tensor,
        index: torch.Tensor,
        stat: torch.Tensor,
        seen: torch.Tensor | None = None,
    ) -> Slots:
        """The slots, R = 1, of some tokens of a prompt.

        Args:
            k: float32 [Hkv, T, D].
            v: float32 [Hkv, T, D].
            index: int64 [Hkv, n], the tokens.
            stat: float32 [Hkv, T].
            seen: float32 [Hkv, w, T], None for w = 0.

        """
        at = index[..., None].expand(-1, -1, k.shape[-1])
        if seen is None:
            seen = stat.new_empty(len(k), 0, k.shape[1])
        rows = index[:, None].expand(-1, seen.shape[1], -1)
        fields = (k.gather(1, at), v.gather(1, at), index, stat.gather(1, index))
        return cls(*(field[None] for field in (*fields, seen.gather(2, rows))))

    @classmethod
    def joined(cls, every: list[Slots]) -> Slots:
        """Slots of equal n as the sequences of one."""
        fields = zip(*(vars(slots).values() for slots in every), strict=True)
        return cls(*(torch.cat(field) for field in fields))

    def copies(self, count: int) -> Slots:
        """The one sequence, several times over."""
        return Slots.joined([self] * count)

    def append(self, token: Step, stat: float) -> None:
        """Give a token a slot of its own."""
        position = torch.full_like(self.position[..., :1], token.t)
        self.k = torch.cat([self.k, token.k[:, :, None]], 2)
        self.v = torch.cat([self.v, token.v[:, :, None]], 2)
        self.position = torch.cat([self.position, position], 2)
        self.stat = torch.nn.functional.pad(self.stat, (0, 1), value=stat)
        self.seen = torch.nn.functional.pad(self.seen, (0, 1))

    def overwrite(self, slot: torch.Tensor, token: Step, stat: float) -> None:
        """Put a token into the slots ``slot`` [R, Hkv]."""
        at = slot[..., None]
        wide = at[..., None].expand(-1, -1, 1, self.k.shape[-1])
        self.k.scatter_(2, wide, token.k[:, :, None])
        self.v.scatter_(2, wide, token.v[:, :, None])
        self.position.scatter_(2, at, token.t)
        self.stat.scatter_(2, at, stat)
        rows = at[:, :, None].expand(-1, -1, self.seen.shape[2], -1)
        self.seen.scatter_(3, rows, 0.0)


@dataclass(frozen=True)
class Step:
    """One new token of R sequences, before attention.

    Attributes:
        q: float32 [R, Hkv, G, D].
        k: float32 [R, Hkv, D].
        v: float32 [R, Hkv, D].
        t: Its position.
        prompt_len: Length of the prompt.
        scale: Softmax scale.

    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    t: int
    prompt_len: int
    scale: float
