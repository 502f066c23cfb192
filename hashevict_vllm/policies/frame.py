"""The frame in which the vote rule describes the keys of a head.

Most of a key is what all keys of its head share: an offset, and how far it points to
the attention sink. Signs say that badly, so a key is taken apart: less the mean key of
the first tokens, its coordinates along two axes are kept as numbers, and only what is
left of it is hashed. The axes need no statistics: they are the key of the first token
and that mean, which are in the cache anyway and never evicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hashevict_vllm.kernels.codes import LONGEST, PARALLEL


@dataclass(frozen=True)
class Described:
    """What a page keeps of keys, and what of them is hashed.

    Three small integers times one power of two pack into 32 bits: the coordinates along
    the axes, -127 to 127, and the length of the rest, 0 to 128. All are 0 of a key that
    is not finite: no query is known to attend to it.

    Attributes:
        numbers: int32 [Hkv, n, 3], two coordinates and the length.
        step: float32 [Hkv, n], a power of two, or 0.
        rest: float32 [Hkv, n, D]; 0 where its length rounds to 0.

    """

    numbers: torch.Tensor
    step: torch.Tensor
    rest: torch.Tensor

    @property
    def along(self) -> torch.Tensor:
        """Coordinates along the axes: float32 [Hkv, n, 2]."""
        return self.numbers[..., :2] * self.step[..., None]

    @property
    def length(self) -> torch.Tensor:
        """Euclidean length of the rest: float32 [Hkv, n]."""
        return self.numbers[..., 2] * self.step

    @property
    def words(self) -> torch.Tensor:
        """As a slot keeps them: int32 [Hkv, n]; the step's exponent is the top byte."""
        first, second, length = (self.numbers & 255).unbind(-1)
        exponent = self.step.view(torch.int32) >> 23 << 24
        return first | second << 8 | length << 16 | exponent


@dataclass(frozen=True)
class KeyFrame:
    """Centre and axes of the keys of one layer.

    In float64, and so is what is rounded, so that the order of a sum does not decide
    where a number is rounded to. Elements that are not finite count as 0: a sink that
    overflowed does not take the votes of all other keys along.

    Attributes:
        centre: float64 [Hkv, D], mean key of the sinks but the first token.
        axes: float64 [Hkv, 2, D], orthonormal, or 0 where there is no such direction.

    """

    centre: torch.Tensor
    axes: torch.Tensor

    @classmethod
    def of(cls, k: torch.Tensor, sinks: int) -> KeyFrame:
        """The frame that the first ``sinks`` of the keys make.

        Args:
            k: [Hkv, n, D], at least ``sinks`` of them.
            sinks: Tokens that are never evicted; 0 leaves keys as they are.

        """
        k = k.double()
        zero = torch.zeros_like(k[:, 0])
        first = _finite(k[:, 0]) if sinks else zero
        centre = _finite(k[:, 1:sinks].mean(1)) if sinks > 1 else zero
        one = _unit(first)
        other = centre - (centre * one).sum(-1, keepdim=True) * one
        parallel = _square(other) <= PARALLEL * _square(centre)
        other = _unit(torch.where(parallel, 0.0, other))
        return cls(centre, torch.stack([one, other], dim=1))

    def describe(self, k: torch.Tensor) -> Described:
        """Take keys [Hkv, n, D] apart."""
        k = k.double() - self.centre[:, None]
        along = k @ self.axes.transpose(1, 2)
        rest = k - along @ self.axes
        length = rest.norm(dim=-1, keepdim=True)
        exact = torch.cat([along, length], dim=-1)
        exact = torch.where((exact.abs() <= LONGEST).all(-1, True), exact, 0.0)
        # The largest of the three lies between 64 and 128 steps.
        largest = exact.abs().amax(-1).float()
        exponent = (largest.view(torch.int32) >> 23) - 6
        step = (exponent.clamp_min(0) << 23).view(torch.float32)
        safe = torch.where(step > 0, step, 1.0).double()[..., None]
        numbers = (exact / safe + 0.5).floor() * (step > 0)[..., None]
        numbers[..., :2].clamp_(-127, 127)
        rest = torch.where(numbers[..., 2:] > 0, rest, 0.0)
        return Described(numbers.int(), step, rest.float())

    def split(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Coordinates float32 [Hkv, G, 2] and rest [Hkv, G, D] of queries [Hkv, G, D].

        Queries are not centred: that would shift all logits of one alike.
        """
        axes = self.axes.float()
        along = q @ axes.transpose(1, 2)
        return along, q - along @ axes


def _finite(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isfinite(), x, 0.0)


def _square(x: torch.Tensor) -> torch.Tensor:
    return (x * x).sum(-1, keepdim=True)


def _unit(x: torch.Tensor) -> torch.Tensor:
    """X [.., D] made of length 1; 0 stays 0."""
    square = _square(x)
    return torch.where(square > 0, x / square.sqrt(), 0.0)
