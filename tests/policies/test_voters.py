"""Which tokens vote: a matter of positions, told here once more and more slowly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.oracle import resolve

from hashevict_vllm.resolved import ResolvedKVPolicy

HORIZON = 256  # tokens before the cache is full from which on votes are kept


def votes(policy: ResolvedKVPolicy, t: int, prompt_len: int) -> bool:
    """Whether the query at position t votes, by the words of `voters`' docstring."""
    if t < policy.sinks or t < 1:  # nothing to vote on, or no frame to describe it in
        return False
    nearly_full = policy.budget - HORIZON
    if t >= prompt_len or policy.segment == 1:
        return t >= nearly_full and t % policy.vote_every == 0
    segment_ends = (t // policy.segment + 1) * policy.segment
    ends = min(segment_ends, prompt_len)
    if t < ends - policy.window:
        return False
    return ends > policy.budget or (ends == prompt_len and ends > nearly_full)


@given(
    st.builds(
        lambda **options: resolve({"scoring": "vote", "recent": 8, **options}),
        budget=st.sampled_from([64, 320]),
        segment=st.sampled_from([1, 64, 256, "prompt"]),
        window=st.sampled_from([1, 16, 64]),
        vote_every=st.integers(1, 8),
        sinks=st.sampled_from([0, 4]),
    ),
    st.integers(1, 700),
    st.integers(0, 100),
    st.integers(1, 80),
)
def test_voters_are_those_of_the_words(
    policy: ResolvedKVPolicy, prompt_len: int, outputs: int, size: int
) -> None:
    expected = [t for t in range(prompt_len + outputs) if votes(policy, t, prompt_len)]
    found: list[int] = []
    start = 0
    while start < prompt_len + outputs:  # runs with no boundary inside, as pieces are
        stop = start + size
        if start < prompt_len:
            stop = min(stop, prompt_len, (start // policy.segment + 1) * policy.segment)
        stop = min(stop, prompt_len + outputs)
        found += policy.voters(start, stop, prompt_len)
        start = stop
    assert found == expected


@pytest.mark.parametrize(
    ("prompt_len", "start", "stop", "expected"),
    [
        (5000, 0, 4096, range(4064, 4096)),  # a segment that will be reduced
        (5000, 4096, 5000, range(4968, 5000)),  # the end of the prompt
        (769, 0, 769, range(737, 769)),  # within the horizon
        (768, 0, 768, range(0)),  # 256 tokens before the cache is full
        (10, 10, 900, range(768, 900, 4)),  # decode, from the horizon on
    ],
)
def test_voters_of_a_policy_as_served(
    prompt_len: int, start: int, stop: int, expected: range
) -> None:
    options = {"budget": 1024, "segment": 4096, "window": 32, "vote_every": 4}
    policy = resolve({"scoring": "vote", **options})
    assert list(policy.voters(start, stop, prompt_len)) == list(expected)


def test_nobody_votes_where_the_rule_asks_nobody() -> None:
    policy = resolve({"scoring": "instant", "budget": 64, "segment": 64})
    assert not policy.voters(0, 64, 200)
    assert not policy.voters(200, 201, 200)
