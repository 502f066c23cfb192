"""What the kernels know of a policy: plain integers, constant for an engine."""

from __future__ import annotations

from typing import NamedTuple

from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.projection import num_words

_SALT = 0xC2B2AE3D


class DeviceRule(NamedTuple):
    """A rule as kernels take it, a compile-time constant as a whole.

    Attributes:
        kind: Kind of score, see `hashevict_vllm.kernels.codes`.
        words: 32-bit words that a slot keeps besides its position.
        bits: b, columns of the projection; 0 for rules that hash nothing.
        sinks: Positions below are protected.
        salt: See `make_salt`.
        budget: C of the server, the largest of any request that evicts.
        segment: S.
        window: Voting queries of a segment; 0 for rules that do not vote.
        every: In decode, one token of so many votes.
        horizon: Steps before the cache is full from which on votes are kept.
        pool: Positions over which votes are max-pooled.

    """

    kind: int
    words: int
    bits: int
    sinks: int
    salt: int
    budget: int
    segment: int
    window: int
    every: int
    horizon: int
    pool: int

    @property
    def hashed(self) -> int:
        """Words of a signature."""
        return num_words(self.bits)

    @property
    def votes(self) -> bool:
        """Whether segments are judged by votes instead of a replay."""
        return self.kind == codes.VOTE

    @property
    def signs(self) -> bool:
        """Whether signatures or norms come from `ops.sign`, before tokens are written.

        Rules that vote describe keys afterwards (`ops.describe`).
        """
        return self.words > 0 and not self.votes


def make_salt(seed: int) -> int:
    """What a seed adds to the pseudo-random mix: 32 bits."""
    return seed * _SALT & 0xFFFFFFFF
