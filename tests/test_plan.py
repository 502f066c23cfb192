"""The plan depends on positions alone, not on how a scheduler cuts a prompt."""

from __future__ import annotations

import dataclasses
from itertools import zip_longest

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from support.oracle import resolve

from hashevict_vllm.attention.cpu.metadata import round_arrays
from hashevict_vllm.attention.rounds import Budgets, Pieces, as_rows, cut_step
from hashevict_vllm.plan import (
    MAX_ROUNDS,
    Piece,
    cut_chunk,
    limit_chunk,
    occupied_slots,
)
from hashevict_vllm.request_budget import policy_with
from hashevict_vllm.resolved import UNBOUNDED

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


@given(policies, st.integers(1, 700), st.integers(0, 900), st.integers(0, 900))
def test_a_chunk_is_cut_to_the_most_tokens_that_few_rounds_take(
    policy,  # type: ignore[no-untyped-def]
    prompt_len: int,
    start: int,
    count: int,
) -> None:
    def num_rounds(tokens: int) -> int:
        return len(list(cut_chunk(policy, 0, 0, start, start + tokens, prompt_len)))

    limited = limit_chunk(policy, start, count, prompt_len)
    assert num_rounds(limited) <= MAX_ROUNDS
    assert limited == count or num_rounds(limited + 1) == MAX_ROUNDS + 1


requests_of_a_step = st.lists(
    st.tuples(  # length of the prompt, tokens computed before, tokens of the step
        st.integers(1, 700),
        st.integers(0, 900),
        st.one_of(st.integers(0, 3), st.integers(0, 400)),
    ),
    min_size=1,
    max_size=6,
)


own_budgets = st.dictionaries(
    st.integers(0, 5), st.one_of(st.integers(20, 200), st.just(UNBOUNDED))
)


@given(
    policies,
    st.sampled_from(["vote", "instant"]),
    st.sampled_from([None, 25.0, 33.3]),
    requests_of_a_step,
    own_budgets,
)
@example(resolve({"budget": 128, "segment": 64}), "vote", 9.0, [(4096, 0, 4096)], {})
@example(
    *(resolve({"budget": 128, "segment": 64}), "vote", 25.0),
    *([(9, 127, 1), (9, 128, 1), (9, 128, 1)], {1: 40, 2: UNBOUNDED}),
)
def test_a_step_is_cut_at_once_as_it_is_piece_by_piece(
    policy,  # type: ignore[no-untyped-def]
    scoring: str,
    percent: float | None,
    requests: list[tuple[int, int, int]],
    own: dict[int, int],
) -> None:
    policy = dataclasses.replace(
        policy, scoring=scoring, sinks=4, recent_percent=percent
    ).with_budget(policy.budget)
    own = {row: budget for row, budget in own.items() if row < len(requests)}
    prompt_lens, begins, counts = np.array(requests, np.int32).T
    starts, ends = np.array([0, *counts]).cumsum(), begins + counts
    expected = [
        cut_chunk(
            *(policy_with(policy, own.get(i)), i),
            *(starts[i], begins[i], ends[i], prompt_lens[i]),
        )
        for i in range(len(requests))
    ]
    rounds = [
        Pieces.of(piece for piece in together if piece is not None)
        for together in zip_longest(*expected)
    ]
    budgets = Budgets.of(policy, len(requests), own)
    found = cut_step(policy, starts, ends, prompt_lens, budgets)
    assert len(found) == len(rounds)
    for ours, pieces in zip(found, rounds, strict=True):
        for name, array in vars(pieces).items():
            assert np.array_equal(getattr(ours, name), array), name


def test_the_tables_of_a_round_say_what_its_pieces_say() -> None:
    evicts = Piece(*(0, 512, 1, 0, 128), budget=128, recent=8, evict=True, ballots=4)
    reads = Piece(*(1, 192, 64, 1, 40), budget=40, recent=9, compact=True)
    pieces = [
        evicts,
        dataclasses.replace(reads, first_voter=32),
        Piece(*(3, 7, 2, 70, 7), budget=128, recent=8, first_voter=2),
    ]
    arrays = round_arrays(Pieces.of(pieces))
    tokens = [(p, i) for p in pieces for i in range(p.count)]
    assert arrays["token_rows"].tolist() == [p.row + i for p, i in tokens]
    assert arrays["positions"].tolist() == [p.start + i for p, i in tokens]
    assert arrays["slots"].tolist() == [p.slot + i for p, i in tokens]
    assert arrays["requests"].tolist() == [p.request for p, _ in tokens]
    assert arrays["evict"].tolist() == [p.evict for p, _ in tokens]
    assert arrays["recent"].tolist() == [p.recent for p, _ in tokens]
    # A token that has evicted is seen again where it votes.
    assert arrays["replay"].tolist() == [
        [0, 512, 1, 0, 128, 128, 8, 0, 0, 4],
        [1, 192, 64, 1, 40, 40, 9, 1, 32, 0],
    ]
    assert Pieces.of(pieces).query_start_loc().tolist() == [0, 1, 65, 67]
    assert Pieces.of(pieces).live.tolist() == [p.live_after_write for p in pieces]
    dtypes = {name: array.dtype for name, array in arrays.items()}
    assert dtypes == dict.fromkeys(arrays, np.dtype(np.int32)) | {
        "evict": np.dtype(bool)
    }


def test_rows_that_lie_together_are_a_slice() -> None:
    assert as_rows(np.arange(5), 5) is None
    assert as_rows(np.arange(2, 5), 6) == slice(2, 5)
    apart = as_rows(np.array([0, 2]), 3)
    assert isinstance(apart, np.ndarray)
    assert apart.tolist() == [0, 2]
