"""The vote rule: when a vote counts, what a new slot starts from, what a slot keeps."""

from __future__ import annotations

import pytest
import torch
from support.oracle import resolve

from hashevict_vllm.policies.base import LiveSlots
from hashevict_vllm.policies.reference import ReferenceLayer

HEADS, DIM, SCALE = 2, 32, 32**-0.5
OPTIONS = {"sinks": 1, "recent": 4, "vote_every": 4, "decay": 0.5}


def read(options: dict[str, object], prompt: int, outputs: int) -> ReferenceLayer:
    """A layer that has read random tokens."""
    torch.manual_seed(0)
    layer = ReferenceLayer(resolve({**OPTIONS, **options}), prompt, HEADS, DIM)
    q, k, v = torch.randn(3, prompt + outputs, HEADS, DIM)
    layer.forward(q[:prompt], k[:prompt], v[:prompt], SCALE)
    for t in range(prompt, prompt + outputs):
        at = slice(t, t + 1)
        layer.forward(q[at], k[at], v[at], SCALE)
    return layer


def token(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A token's q, k and v."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 1, HEADS, DIM, generator=generator))  # type: ignore[return-value]


def test_a_vote_counts_from_the_next_token_on() -> None:
    """What a voter's query says does not decide which slot its own token overwrites."""
    survivors, votes = [], []
    for seed in range(5):
        layer = read({"budget": 40}, prompt=60, outputs=0)
        assert layer.policy.voters(60, 61, 60)
        _, k, v = token(0)
        layer.forward(token(seed)[0], k, v, SCALE)
        survivors.append(layer.slots.position)
        votes.append(layer.slots.votes)
    for other in range(1, 5):
        assert torch.equal(survivors[0], survivors[other])
        assert not torch.equal(votes[0], votes[other])


def test_a_slot_starts_without_votes_and_its_own_token_casts_none_for_it() -> None:
    layer = read({"budget": 40}, prompt=60, outputs=0)
    for t in range(60, 70):
        layer.forward(*token(t), SCALE)
        newest = layer.slots.position.argmax(1)
        assert layer.slots.position[0, newest[0]] == t
        assert bool((layer.slots.votes.gather(1, newest[:, None]) == 0).all())


@pytest.mark.parametrize("value_votes", [0.0, 2.5])
def test_a_ballot_fades_earlier_votes_and_spreads_votes_over_the_others(
    value_votes: float,
) -> None:
    """One by the estimated attention of a single query, and those for values."""
    layer = read({"budget": 40, "value_votes": value_votes}, prompt=60, outputs=0)
    before = layer.slots
    layer.forward(*token(60), SCALE)
    after = layer.slots
    for head in range(HEADS):
        kept = torch.isin(before.position[head], after.position[head])
        earlier = before.votes[head, kept] * 0.5
        cast = after.votes[head, :-1] - earlier  # the newest comes last
        assert bool((cast >= 0).all())
        total = torch.tensor(1.0 + value_votes)
        torch.testing.assert_close(cast.sum(), total, atol=1e-4, rtol=0)


def test_neighbourhoods_choose_at_a_prompts_end_and_slots_keep_half_of_them() -> None:
    def by_position(
        slots: LiveSlots, values: torch.Tensor, head: int
    ) -> dict[int, float]:
        pairs = zip(slots.position[head].tolist(), values[head].tolist(), strict=True)
        return dict(pairs)

    votes_alone = {"budget": 50, "value_weight": 0}
    whole = read({"budget": 199, "pool": 15}, prompt=150, outputs=0)  # all stays
    pooled = read({**votes_alone, "pool": 15}, prompt=150, outputs=0)
    alone = read({**votes_alone, "pool": 1}, prompt=150, outputs=0)
    assert not torch.equal(pooled.slots.position, alone.slots.position)
    slots = whole.slots
    merit = pooled.rule.merit(slots.position, slots.votes, slots.v, goes_on=False)
    for head in range(HEADS):
        own = by_position(slots, slots.votes, head)
        least = by_position(slots, merit / 2, head)
        for layer in (pooled, alone):
            found = by_position(layer.slots, layer.slots.votes, head)
            assert len(found) == 50
            raised = {at for at, votes in found.items() if votes != own[at]}
            assert all(found[at] > own[at] for at in raised)
            for at in raised:  # but for the bits that say how large the value is
                assert found[at] == pytest.approx(least[at], rel=1e-5)
            assert bool(raised) == (layer is pooled)
            assert len(raised) < 50  # heavy slots keep their own


@pytest.mark.parametrize(("recent", "protected"), [(8, 8), (32, 32), (60, 32)])
def test_a_selection_protects_the_last_32_tokens_and_decode_all_recent_ones(
    recent: int, protected: int
) -> None:
    layer = read({"budget": 100, "recent": recent}, prompt=300, outputs=0)
    for positions in layer.slots.position:
        kept = set(positions.tolist())
        assert kept >= set(range(300 - protected, 300))
        assert not kept >= set(range(300 - protected - 20, 300 - protected))
    survivors = [set(x.tolist()) for x in layer.slots.position]
    for t in range(300, 320):
        layer.forward(*token(t), SCALE)
        before = survivors
        survivors = [set(x.tolist()) for x in layer.slots.position]
        for was, now in zip(before, survivors, strict=True):
            assert now >= {p for p in was if p > t - 1 - recent} | {t}
