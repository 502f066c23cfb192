"""What a prompt says besides what it asks: credit for values unlike the others.

A prompt's last queries know what is asked now, not what may be asked later. For that,
slots that carry something of their own are the best guess: a value far from the mean
of its head changes what attention gives, wherever it is read. VATP (arXiv 2406.12335)
multiplies attention by the norm of values. Here the mean is taken off, which all
answers of a head hold, and credit is added to votes, as nobody votes for what nobody
asks yet. Where a segment ends and the prompt goes on, nobody has asked anything, and
credit counts `BEFORE_THE_END` times as much.
"""

from __future__ import annotations

import torch

from hashevict_vllm.kernels.codes import BESIDE, LONGEST


def distances(position: torch.Tensor, v: torch.Tensor, sinks: int) -> torch.Tensor:
    """Squared distance of values from their mean, averaged with the neighbours'.

    The mean is over all slots but the sinks. Neighbours are those of at most `BESIDE`
    positions to either side that differ from the mean at all, the slot itself among
    them. What is not finite counts as no distance.

    Args:
        position: int64 [Hkv, n].
        v: float32 [Hkv, n, D].
        sinks: Positions below have no part in the mean.

    Returns:
        float64 [Hkv, n].

    """
    v, counted = v.double(), (position >= sinks)[..., None]
    total = torch.where(counted, v, 0.0).sum(1, keepdim=True)
    square = (v - total / counted.sum(1, keepdim=True)).square().sum(-1)
    square = torch.where(square <= LONGEST, square, 0.0)
    near = (position[:, :, None] - position[:, None]).abs() <= BESIDE
    near = near & (square > 0)[:, None]
    summed = torch.where(near, square[:, None], 0.0).sum(-1)
    return summed / near.sum(-1).clamp_min(1)


def credit(
    position: torch.Tensor, v: torch.Tensor, sinks: int, weight: float
) -> torch.Tensor:
    """``weight`` times the square of a slot's `distances` over their mean.

    0 where that is no number: where all values are alike, or some are not finite. (On
    GPUs, which sum in float32, values that are alike may get credit that is alike.)

    Args:
        position: int64 [Hkv, n].
        v: float32 [Hkv, n, D].
        sinks: As `distances`; the mean of distances is without them, too.
        weight: See `credit_weight`.

    Returns:
        float32 [Hkv, n], votes.

    """
    apart = distances(position, v, sinks)
    counted = position >= sinks
    mean = torch.where(counted, apart, 0.0).sum(1) / counted.sum(1)
    given = weight * (apart / mean[:, None]).square()
    return torch.where(given <= LONGEST, given, 0.0).float()


def credit_weight(credit: float, budget: int, slots: int) -> float:
    """What a slot gets whose value is as far from the mean as the average one's.

    The mean slot gets ``window / slots`` votes; times ``value_weight`` s (1 - s)^2 that
    is the weight, where s is the share of slots that stay. ``credit`` is both numbers'
    product (`ResolvedKVPolicy.credit`). Where few may stay, what is asked now comes
    first. Where most may, votes that are small decide, and even little credit is enough
    to keep what is unusual.
    """
    kept = budget / slots
    return credit * kept * (1 - kept) ** 2 / slots
