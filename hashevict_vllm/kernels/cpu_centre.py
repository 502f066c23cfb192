"""The centre that signatures of the vote rule are taken around (numba).

See `hashevict_vllm.policies.vote.Vote.centred_keys`: sinks are appended first and never
evicted or moved, so slot i holds position i, and their mean key can be read again from
the page at every step. The worker keeps nothing per request.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hashevict_vllm.kernels.cpu_scores import hash_row, square_of
from hashevict_vllm.kernels.cpu_slots import load_key, tail_of


@njit
def centre_of(elements, blocks, head, k_map, geometry, sinks, x, centre):
    """Mean key of slots [1, sinks) into ``centre`` [D], zeros if there are none.

    ``x`` float32 [D] is scratch.
    """
    centre[:] = np.float32(0)
    for slot in range(1, sinks):
        load_key(elements, blocks, slot, head, k_map, geometry, x)
        for d in range(len(x)):
            centre[d] += x[d]
    if sinks > 1:
        share = np.float32(1) / np.float32(sinks - 1)
        for d in range(len(x)):
            centre[d] *= share


@njit
def describe_centred(x, centre, projection, dots, words):
    """Signature and norm of the centred key, and no votes, into ``words`` [W].

    ``x`` [D], the key, is centred in place.
    """
    for d in range(len(x)):
        x[d] -= centre[d]
    hashed = len(words) - 2
    hash_row(x, projection, dots, words[:hashed])
    words.view(np.float32)[hashed] = np.sqrt(square_of(x))
    words[hashed + 1] = 0


@njit
def describe_sinks(
    elements,
    tail,
    blocks,
    head,
    projection,
    k_map,
    geometry,
    sinks,
    x,
    dots,
    words,
    centre,
):
    """Describe slots [0, sinks), once the last of them is there.

    ``words`` int32 [W] is scratch.
    """
    block_size = geometry[1]
    for slot in range(sinks):
        load_key(elements, blocks, slot, head, k_map, geometry, x)
        describe_centred(x, centre, projection, dots, words)
        at = tail_of(blocks, slot, head, geometry) + slot % block_size
        for w in range(len(words)):
            tail[at + w * block_size] = words[w]
