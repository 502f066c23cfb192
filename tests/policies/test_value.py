"""Credit for unusual values, when a prompt is reduced (`policies.value`)."""

from __future__ import annotations

import pytest
import torch
from support.oracle import resolve

from hashevict_vllm.kernels.codes import PROMPT_ENDS, PROMPT_GOES_ON
from hashevict_vllm.plan import cut_chunk
from hashevict_vllm.policies.reference import ReferenceLayer
from hashevict_vllm.policies.value import credit, credit_weight, distances
from hashevict_vllm.policies.vote import Vote

HEADS, DIM, SCALE = 2, 32, 32**-0.5
PROMPT, UNUSUAL = 150, (40, 41, 97)


def kept(**options: object) -> list[set[int]]:
    """Positions that each head keeps of a prompt with a few unusual values."""
    torch.manual_seed(0)
    policy = resolve({"budget": 50, "sinks": 1, "recent": 4, **options})
    layer = ReferenceLayer(policy, PROMPT, HEADS, DIM)
    q, k, v = torch.randn(3, PROMPT, HEADS, DIM)
    v[list(UNUSUAL)] *= 4
    layer.forward(q, k, v, SCALE)
    return [set(positions) for positions in layer.slots.position.tolist()]


def test_unusual_values_stay_though_nobody_asks_for_them() -> None:
    for positions in kept():
        assert positions >= set(UNUSUAL)
    assert any(not positions >= set(UNUSUAL) for positions in kept(value_weight=0))


def test_an_average_slot_gets_its_weight_and_others_go_by_the_square() -> None:
    position = torch.arange(0, 20, 2).expand(1, -1)  # nobody is beside anybody
    v = torch.zeros(1, 10, 4)
    v[0, :, 0] = torch.tensor([1.0, -1.0] * 5)
    assert credit(position, v, 0, 3.0).tolist() == [[3.0] * 10]
    v[0, :, 0] *= torch.tensor([1.0] * 8 + [2.0] * 2)
    apart = distances(position, v, 0)
    assert apart.tolist() == [[1.0] * 8 + [4.0] * 2]
    torch.testing.assert_close(
        credit(position, v, 0, 3.0), 3.0 * (apart / apart.mean()).square().float()
    )


def test_neighbours_share_and_sinks_have_no_part() -> None:
    position = torch.tensor([[0, 1, 2, 3, 9]])
    v = torch.tensor([[[100.0], [0.0], [3.0], [-3.0], [0.0]]])
    # The mean of the last four is 0; the second and the last do not differ from it.
    expected = [10_000.0, (10_000 + 9) / 2, 9.0, 9.0, 0.0]
    assert distances(position, v, sinks=1).tolist() == [expected]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_no_value_makes_credit_that_is_no_number(value: float) -> None:
    torch.manual_seed(0)
    v = torch.randn(HEADS, 30, DIM)
    v[:, 7] = value
    got = credit(torch.arange(30).expand(HEADS, -1), v, 1, 5.0)
    assert bool((got == 0).all())
    alike = torch.full((HEADS, 30, DIM), 0.1)
    assert not credit(torch.arange(30).expand(HEADS, -1), alike, 1, 5.0).any()


def test_a_prompt_that_goes_on_has_asked_nothing_yet() -> None:
    rule = Vote(resolve({"budget": 64, "segment": 96}))
    torch.manual_seed(0)
    position, v = torch.arange(100).expand(HEADS, -1), torch.randn(HEADS, 100, DIM)
    none = torch.zeros(HEADS, 100)
    at_its_end = rule.merit(position, none, v, goes_on=False)
    on_the_way = rule.merit(position, none, v, goes_on=True)
    torch.testing.assert_close(on_the_way, 8 * at_its_end)
    assert bool((at_its_end > 0).any())


@pytest.mark.parametrize(("length", "goes_on"), [(95, 0), (96, 0), (97, 1), (193, 2)])
def test_only_pieces_before_a_prompts_end_go_on(length: int, goes_on: int) -> None:
    policy = resolve({"budget": 64, "segment": 96})
    pieces = list(cut_chunk(policy, 0, 0, 0, length, length))
    why = [piece.compact for piece in pieces if piece.compact]
    assert why == [PROMPT_GOES_ON] * goes_on + [PROMPT_ENDS]


def test_a_sink_may_lie_as_far_out_as_it_likes() -> None:
    torch.manual_seed(0)
    position, v = torch.arange(30).expand(HEADS, -1), torch.randn(HEADS, 30, DIM)
    usual = credit(position, v, 2, 5.0)
    v[:, 0] = 1e18
    assert torch.equal(credit(position, v, 2, 5.0)[:, 3:], usual[:, 3:])
    assert bool((credit(position, v, 2, 5.0)[:, 0] == 0).all())


def test_credit_is_most_where_a_third_of_the_slots_may_stay() -> None:
    shares = (0.01, 0.1, 0.3, 0.5, 0.7, 1.0)
    weights = [credit_weight(128 * 16, int(1000 * s), 1000) for s in shares]
    assert weights[1] == pytest.approx(128 * 16 / 1000 * 0.1 * 0.9**2)
    assert weights[0] < weights[1] < weights[2] > weights[3] > weights[4]
    assert weights[5] == credit_weight(0, 300, 1000) == 0
