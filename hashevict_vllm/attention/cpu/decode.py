"""The plan of a step in which every request decodes one token, for all at once.

What `hashevict_vllm.attention.plan` says of each such token, without Python objects per
request: most steps of a server are of this kind, and a layer of a small model takes
less time than the objects of a large batch. tests/test_plan.py compares the two.
"""

from __future__ import annotations

import numpy as np

from hashevict_vllm.resolved import ResolvedKVPolicy


def decode_arrays(
    policy: ResolvedKVPolicy, positions: np.ndarray
) -> dict[str, np.ndarray]:
    """The arrays of a round of one token per request, none of them in its prompt.

    Args:
        policy: The resolved policy.
        positions: int [n], position of each request's token; at least the length of its
            prompt.

    Returns:
        The arrays of `hashevict_vllm.attention.cpu.metadata.Round`.

    """
    positions = positions.astype(np.int32)
    rows = np.arange(len(positions), dtype=np.int32)
    slots = np.minimum(positions, np.int32(policy.budget))
    evict = positions >= policy.budget
    voters = np.zeros(len(positions), bool)
    if policy.votes:
        voters = (positions >= policy.first_ballot) & (
            positions % policy.vote_every == 0
        )
    # They vote after attention.
    (voting,) = np.nonzero(voters)
    replay = np.zeros((len(voting), 8), np.int32)
    if len(voting):
        replay[:, 0], replay[:, 1], replay[:, 2] = voting, positions[voting], 1
        replay[:, 3], replay[:, 4] = voting, slots[voting]
        replay[:, 7] = policy.vote_every
    return {
        "token_rows": rows,
        "positions": positions,
        "slots": slots,
        "evict": evict,
        "requests": rows,
        "replay": replay,
    }
