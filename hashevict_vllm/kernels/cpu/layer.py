"""What kernels know of a layer: where its slots lie, and the rule they go by (numba).

The entry points (`kernels.cpu.launch`) take plain arrays, which numba unpacks
fastest when Python calls; everything behind them takes these tuples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from hashevict_vllm.kernels.codes import HAMMING_TO_QUERY
from hashevict_vllm.kernels.cpu.views import unowned


class Pages(NamedTuple):
    """A layer's pages (`hashevict_vllm.cache.page`).

    Attributes:
        elements: Raw K/V elements, unsigned [..].
        tail: int32 view of the same bytes.
        k_map: int32 [N, D], element of K[slot, d] within a (block, head).
        v_map: int32 [N, D], the same for V.
        heads: H, KV heads.
        block_size: N, slots of a block.
        dim: D, elements of a head.
        words: W, words that a slot keeps beside its position.
        element_stride: Elements from one block to the next.
        word_stride: Tail words from one block to the next.
        first_word: Tail word of a block at which its tail begins.
        kind: How elements are read (`hashevict_vllm.kernels.codes`).

    """

    elements: np.ndarray
    tail: np.ndarray
    k_map: np.ndarray
    v_map: np.ndarray
    heads: int
    block_size: int
    dim: int
    words: int
    element_stride: int
    word_stride: int
    first_word: int
    kind: int


class Rule(NamedTuple):
    """An eviction rule in numbers.

    Attributes:
        score: Kind of score (`hashevict_vllm.kernels.codes`).
        sinks: Positions below this are protected.
        seed: Of random scores.
        pool: Positions over which votes are pooled.
        vote_every: In decode, one token of so many votes.
        projection: float32 [D * b], R row-major; empty where nothing is hashed.
        bits: b.
        gain: Factor of the hashed part of a logit, float32.
        decay: Factor on earlier votes, float32.
        scale: Of the softmax, float32.
        credit: ``value_weight`` times ``window``, float32
            (`hashevict_vllm.policies.value.credit_weight`).
        value_votes: Votes of a ballot for large values, float32.

    """

    score: int
    sinks: int
    seed: int
    pool: int
    vote_every: int
    projection: np.ndarray
    bits: int
    gain: float
    decay: float
    scale: float
    credit: float
    value_votes: float


class Scratch(NamedTuple):
    """What a thread computes in.

    Attributes:
        x: float32 [G D], queries of a KV head; G is 1 where no query is hashed.
        dots: float32 [G b], their projections.
        sources: int32 [G, W], their signatures.
        key: float32 [D].
        key_dots: float32 [b].
        words: int32 [W], zeros at first: what a slot keeps of a key.
        scores: int32 [N], of a block's slots.

    """

    x: np.ndarray
    dots: np.ndarray
    sources: np.ndarray
    key: np.ndarray
    key_dots: np.ndarray
    words: np.ndarray
    scores: np.ndarray


@njit
def new_scratch(pages, rule, tokens):
    """`Scratch` for the tokens of a step (`hashevict_vllm.kernels.cpu.tokens`)."""
    group = tokens.group if rule.score == HAMMING_TO_QUERY else 1
    return Scratch(
        np.empty(group * pages.dim, np.float32),
        np.empty(group * rule.bits, np.float32),
        np.empty((group, pages.words), np.int32),
        np.empty(pages.dim, np.float32),
        np.empty(rule.bits, np.float32),
        np.zeros(pages.words, np.int32),
        np.empty(pages.block_size, np.int32),
    )


@njit
def unowned_scratch(own):
    """The same arrays, unowned, as numba counts a reference at every use of its own.

    The owner must be held (`hold`) until the last use.
    """
    return Scratch(
        unowned(own.x),
        unowned(own.dots),
        unowned(own.sources),
        unowned(own.key),
        unowned(own.key_dots),
        unowned(own.words),
        unowned(own.scores),
    )


@njit
def hold(scratch, chosen):
    """Keep owners of unowned arrays alive until here."""


@njit
def pages_of(elements, tail, k_map, v_map, geometry):
    """`Pages` of what `kernels.cpu.launch.write_tokens` takes, unowned."""
    return Pages(
        unowned(elements),
        unowned(tail),
        unowned(k_map),
        unowned(v_map),
        geometry[0],
        geometry[1],
        geometry[2],
        geometry[3],
        geometry[4],
        geometry[5],
        geometry[6],
        geometry[7],
    )


@njit
def rule_of(rule, projection, bits, strengths):
    """`Rule` of what `kernels.cpu.launch.write_tokens` takes, unowned."""
    return Rule(
        rule[1],
        rule[0],
        rule[2],
        rule[3],
        rule[4],
        unowned(projection),
        bits,
        strengths[0],
        strengths[1],
        strengths[2],
        strengths[3],
        strengths[4],
    )
