"""The centre that signatures of the vote rule are taken around (numba).

See `hashevict_vllm.policies.vote.Vote.centred_keys`: sinks are appended first and never
evicted or moved, so slot i holds position i, and their mean key can be read again from
the page at every step. The worker keeps nothing per request.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from hashevict_vllm.kernels.codes import BFLOAT16, FLOAT16
from hashevict_vllm.kernels.cpu_hash import hash_row
from hashevict_vllm.kernels.cpu_scores import square_of
from hashevict_vllm.kernels.cpu_slots import FP16_REBIAS, elements_of, load_key, tail_of
from hashevict_vllm.kernels.cpu_vector import LANES, sum_of_run


@njit
def adjacent_keys(k_map, sinks):
    """Which lanes of a run of keys the centre is the mean of, where keys lie in runs.

    Where an element of consecutive keys is consecutive in memory (the stock layout of
    most CPUs), a run of them is read at once.

    Returns:
        uint32 [n], all bits of slots [1, sinks) set, n a multiple of 16; empty where
        keys do not lie so.

    """
    slots, dim = k_map.shape
    for slot in range(1, min(sinks, slots)):
        first, here = k_map[0], k_map[slot]
        for d in range(dim):
            if here[d] - first[d] != slot:
                return np.zeros(0, np.uint32)
    lanes = np.zeros((sinks + LANES - 1) // LANES * LANES, np.uint32)
    lanes[1:sinks] = np.uint32(0xFFFFFFFF)
    return lanes


@njit
def _add_runs(page, starts, lanes, kind, centre):
    """Add the chosen lanes of a run of 16 keys; ``starts`` [D], its first elements."""
    sign, rest, shift = np.uint32(0), np.uint32(0xFFFFFFFF), np.uint32(0)
    if kind == BFLOAT16:
        rest, shift = np.uint32(0xFFFF), np.uint32(16)
    elif kind == FLOAT16:
        sign, rest, shift = np.uint32(0x8000), np.uint32(0x7FFF), np.uint32(13)
    for d in range(len(centre)):
        at = np.int64(starts[d])
        centre[d] += sum_of_run(page, at, lanes, sign, rest, shift)


@njit
def centre_of(elements, blocks, head, k_map, lanes, geometry, sinks, x, centre):
    """Mean key of slots [1, sinks) into ``centre`` [D], zeros if there are none.

    ``lanes`` as `adjacent_keys`; ``x`` float32 [D] is scratch.
    """
    block_size, kind = geometry[1], geometry[7]
    centre[:] = np.float32(0)
    if sinks < 2:
        return
    share = np.float32(1) / np.float32(sinks - 1)
    if len(lanes):
        for slot in range(0, sinks, LANES):
            start = elements_of(blocks, slot, head, geometry)
            page = elements[start : start + 2 * block_size * len(centre)]
            chosen = lanes[slot : slot + LANES]
            _add_runs(page, k_map[slot % block_size], chosen, kind, centre)
        if kind == FLOAT16:
            share *= FP16_REBIAS
    else:
        for slot in range(1, sinks):
            load_key(elements, blocks, slot, head, k_map, geometry, x)
            for d in range(len(x)):
                centre[d] += x[d]
    for d in range(len(centre)):
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
