"""What slots are worth besides what is asked: values count, too.

A prompt's last queries know what is asked now, not what may be asked later. For that,
slots that carry something of their own are the best guess: a value far from the mean
of its head changes what attention gives, wherever it is read. VATP (arXiv 2406.12335)
multiplies attention by the norm of values. Here the mean is taken off, which all
answers of a head hold, and credit is added to votes, as nobody votes for what nobody
asks yet. Where a segment ends and the prompt goes on, nobody has asked anything, and
credit counts `BEFORE_THE_END` times as much.

In decode every ballot spreads some more votes over the slots, by how large their values
are. What is needed once and late, such as a number of the question, gets no votes until
then; large values tell it from what is never needed. The norm is known when a token is
written, and a slot keeps its octave in the lowest bits of its votes (`octaves`).
"""

from __future__ import annotations

import torch

from hashevict_vllm.kernels.codes import BESIDE, LONGEST, LOWEST_OCTAVE, OCTAVES


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


def octaves(v: torch.Tensor) -> torch.Tensor:
    """Octave of the squared norm of values.

    The exponent of a float32, 0 for `LOWEST_OCTAVE` and less, at most `OCTAVES`, as
    for what is not finite.

    Args:
        v: float32 [Hkv, n, D].

    Returns:
        int32 [Hkv, n].

    """
    square = v.double().square().sum(-1).float()
    exponent = (square.view(torch.int32) >> 23 & 255) - 127
    return (exponent - LOWEST_OCTAVE).clamp(0, OCTAVES)


def spread(v: torch.Tensor, votes: float) -> torch.Tensor:
    """``votes`` over slots in proportion to the octaves of their squared norms.

    Args:
        v: float32 [Hkv, n, D].
        votes: In sum.

    Returns:
        float32 [Hkv, n].

    """
    size = torch.exp2((octaves(v) + LOWEST_OCTAVE).float())
    return size * (votes / size.sum(1, keepdim=True))


def without_octaves(votes: torch.Tensor) -> torch.Tensor:
    """Votes float32 [..], rounded down to what is left of their bits (`OCTAVES`)."""
    return (votes.contiguous().view(torch.int32) & ~OCTAVES).view(torch.float32)
