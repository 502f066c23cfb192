"""Votes of slots as pages keep them, against the oracle's."""

from __future__ import annotations

import torch

from hashevict_vllm.kernels.codes import OCTAVES
from hashevict_vllm.policies.base import LiveSlots
from hashevict_vllm.policies.value import octaves, without_octaves

TOLERANCE = 2.0**-17
"""Relative; votes are rounded down to 18 bits at every ballot, and a rounding error
before that may move them by one in the last of these."""


def assert_votes(words: torch.Tensor, slots: LiveSlots) -> None:
    """Assert that the last of words int32 [.., n, W] holds votes and octaves of slots.

    Raises:
        AssertionError: If votes are not close, or octaves differ.

    """
    found = words[..., -1].contiguous()
    votes = without_octaves(found.view(torch.float32))
    torch.testing.assert_close(votes, slots.votes, rtol=TOLERANCE, atol=1e-5)
    assert torch.equal(found & OCTAVES, octaves(slots.v))
