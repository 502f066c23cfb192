"""The plan depends on positions alone, not on how a scheduler cuts a prompt."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.oracle import resolve

from hashevict_vllm.attention.cpu.decode import decode_arrays
from hashevict_vllm.attention.cpu.metadata import _round_arrays
from hashevict_vllm.attention.plan import Piece, cut_chunk, occupied_slots

policies = st.builds(
    lambda budget, segment: resolve(
        {"budget": budget, "segment": segment, "sinks": 0, "recent": 8}
    ),
    st.integers(40, 200),
    st.sampled_from([1, 32, 64, 160, "prompt"]),
)


def chunks_of(policy, total: int, prompt_len: int, sizes: list[int]) -> list[Piece]:  # type: ignore[no-untyped-def]
    pieces, start, i = [], 0, 0
    while start < total:
        end = min(start + sizes[i % len(sizes)], total)
        pieces += cut_chunk(policy, 0, start, start, end, prompt_len)
        start, i = end, i + 1
    return pieces


def per_token(pieces: list[Piece]) -> list[tuple[int, int, bool]]:
    """(position, slot, evicts) of every token."""
    return [
        (piece.start + i, piece.slot + i, piece.evict)
        for piece in pieces
        for i in range(piece.count)
    ]


@given(
    policies,
    st.integers(1, 600),
    st.integers(0, 100),
    st.lists(st.integers(1, 300), min_size=1, max_size=5),
)
def test_slots_and_reductions_do_not_depend_on_how_the_prompt_is_chunked(
    policy,  # type: ignore[no-untyped-def]
    prompt_len: int,
    outputs: int,
    sizes: list[int],
) -> None:
    total = prompt_len + outputs
    one = chunks_of(policy, total, prompt_len, [total])
    many = chunks_of(policy, total, prompt_len, sizes)
    assert per_token(one) == per_token(many)

    def voters(pieces: list[Piece]) -> list[int]:
        return [
            p.start + i
            for p in pieces
            for i in range(p.first_voter, p.count, max(p.ballots, 1))
        ]

    assert voters(one) == voters(many)
    assert one == [] or max(p.ballots for p in one) in (0, policy.vote_every)

    def reductions(pieces: list[Piece]) -> list[int]:
        return [p.start + p.count for p in pieces if p.compact]

    assert reductions(one) == reductions(many)


@given(policies, st.integers(1, 600), st.integers(0, 100))
def test_a_request_never_uses_more_slots_than_the_contract_says(
    policy,  # type: ignore[no-untyped-def]
    prompt_len: int,
    outputs: int,
) -> None:
    total = prompt_len + outputs
    scratch = policy.segment if policy.segment > 1 else 0
    for piece in chunks_of(policy, total, prompt_len, [37]):
        bound = policy.budget
        if piece.start < prompt_len:
            bound = max(bound, min(prompt_len, policy.budget + scratch))
        assert piece.live_after_write <= bound
        assert piece.row == piece.start
    for done in range(prompt_len, total + 1):
        assert occupied_slots(policy, done, prompt_len) == min(done, policy.budget)


@given(policies, st.integers(1, 600))
def test_a_prompt_within_the_budget_is_one_piece_like_stock(policy, n: int) -> None:  # type: ignore[no-untyped-def]
    n = min(n, policy.budget)
    (piece,) = cut_chunk(policy, 0, 0, 0, n, n)
    assert (piece.slot, piece.count, piece.evict, piece.compact) == (0, n, False, False)


@given(
    policies,
    st.sampled_from(["vote", "instant"]),
    st.lists(st.tuples(st.integers(1, 400), st.integers(0, 400)), min_size=1),
)
def test_a_decode_step_is_planned_at_once_as_it_is_piece_by_piece(
    policy,  # type: ignore[no-untyped-def]
    scoring: str,
    requests: list[tuple[int, int]],
) -> None:
    policy = dataclasses.replace(policy, scoring=scoring, sinks=4)
    pieces, positions = [], []
    for row, (prompt_len, generated) in enumerate(requests):
        position = prompt_len + generated
        pieces += cut_chunk(policy, row, row, position, position + 1, prompt_len)
        positions.append(position)
    expected = _round_arrays(pieces, policy.budget)
    found = decode_arrays(policy, np.array(positions))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert np.array_equal(found[name], array), name
    live = [piece.live_after_write for piece in pieces]
    assert live == np.minimum(np.array(positions) + 1, policy.budget).tolist()
