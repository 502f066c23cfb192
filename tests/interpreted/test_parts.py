"""Single Triton kernels: the plan, signatures, integer helpers, no host in decode."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from support.host import forbidden_on_host
from support.oracle import resolve
from support.paged_triton import TritonLayer

from hashevict_vllm.attention.gpu.rule import device_rule
from hashevict_vllm.attention.rounds import Budgets
from hashevict_vllm.config import KVPolicyError
from hashevict_vllm.kernels.pages import DevicePages, view_pages
from hashevict_vllm.kernels.projection import make_projection
from hashevict_vllm.kernels.signature import pack_bits, signature_bits
from hashevict_vllm.kernels.triton import ops
from hashevict_vllm.kernels.triton.arguments import Page, Scratch, Signed, Step, Tokens
from hashevict_vllm.kernels.triton.bits import popcount
from hashevict_vllm.kernels.triton.pieces import NAMES
from hashevict_vllm.plan import Piece, cut_chunk
from hashevict_vllm.request_budget import policy_with
from hashevict_vllm.resolved import UNBOUNDED

POISON = -123456789

policies = st.builds(
    lambda budget, segment, sinks, rule: resolve(
        {"budget": budget, "segment": segment, "sinks": sinks, "recent": 3, **rule}, 16
    ),
    st.integers(24, 300),
    st.sampled_from([1, 16, 32, 160, "prompt"]),
    st.integers(0, 5),
    st.sampled_from(
        [{"scoring": "instant"}, {"scoring": "vote", "window": 20, "vote_every": 3}]
    ),
)


def columns_of(piece: Piece) -> list[int]:
    """A piece as the kernels' table has it."""
    values = {**vars(piece), "live": piece.live_after_write}
    return [int(values[name]) for name in NAMES]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    policies,
    st.lists(
        st.tuples(st.integers(1, 700), st.integers(0, 800), st.integers(0, 300)),
        max_size=3,
    ),
    st.integers(0, 2),
    st.dictionaries(
        st.integers(0, 2), st.one_of(st.integers(20, 100), st.just(UNBOUNDED))
    ),
)
def test_the_device_plans_what_the_host_plans(
    policy,  # type: ignore[no-untyped-def]
    requests: list[tuple[int, int, int]],
    padding: int,
    own: dict[int, int],
) -> None:
    policy = replace(policy, recent_percent=25.0).with_budget(policy.budget)
    own = {row: budget for row, budget in own.items() if row < len(requests)}
    starts, lens, expected = [0], [], []
    for request, (prompt, start, count) in enumerate(requests):
        mine = policy_with(policy, own.get(request))
        pieces = cut_chunk(mine, request, starts[-1], start, start + count, prompt)
        expected.append(list(pieces))
        starts.append(starts[-1] + count)
        lens.append(start + count)
    num, tokens = len(requests) + padding, starts[-1] + padding
    prompts = [prompt for prompt, _, _ in requests]
    table = torch.full((num, ops.NUM_COLUMNS), POISON, dtype=torch.int32)
    live, done = (torch.full((num,), POISON, dtype=torch.int32) for _ in range(2))
    token_piece = torch.full((tokens,), POISON, dtype=torch.int32)
    ints = {"dtype": torch.int32}
    kept = Budgets.of(policy, num, own)
    arguments = (
        torch.tensor(starts + [starts[-1]] * padding, **ints),
        torch.tensor(lens + [0] * padding, **ints),
        torch.tensor(prompts + [0] * padding, **ints),
        *(torch.tensor(x, **ints) for x in kept),
        done,
        table,
        live,
        token_piece,
        device_rule(policy),
    )
    rounds = max((len(pieces) for pieces in expected), default=0)
    for index in range(min(rounds + 1, 12)):  # one more: nothing is left to do
        if num:
            ops.plan(*arguments, index == 0)
        for request, row in enumerate(table.tolist()):
            pieces = expected[request] if request < len(requests) else []
            if index < len(pieces):
                assert row == columns_of(pieces[index])
                assert live[request] == pieces[index].live_after_write
            else:
                assert row[NAMES.index("count")] == 0
                assert row[NAMES.index("evict")] == row[NAMES.index("compact")] == 0
                assert live[request] == 0
    owners = [i for i, (_, _, count) in enumerate(requests) for _ in range(count)]
    if num:
        assert token_piece.tolist() == owners + [-1] * padding


@pytest.mark.parametrize("made_up", [[0], [1], [0, 1]])
def test_requests_that_vllm_makes_up_are_attended_and_left_alone(
    made_up: list[int],
) -> None:
    policy = resolve(
        {"scoring": "vote", "budget": 64, "sinks": 1, "recent": 8, "segment": 16}, 16
    )
    table = torch.full((2, ops.NUM_COLUMNS), POISON, dtype=torch.int32)
    owner, live, done = (torch.full((2,), POISON, dtype=torch.int32) for _ in range(3))
    slot_mapping = torch.tensor([3, 5])
    slot_mapping[made_up] = -1
    ints = {"dtype": torch.int32}
    lens = [1, 81]  # one writes the only sink; the other evicts and votes
    starts, prompts = torch.tensor([0, 1, 2], **ints), torch.zeros(2, **ints)
    kept = (torch.full((2,), n, **ints) for n in (policy.budget, policy.recent))
    arguments = (starts, torch.tensor(lens, **ints), prompts, *kept, done)
    rule = device_rule(policy)
    ops.plan(*arguments, table, live, owner, rule, True, slot_mapping)
    real = [i for i in range(2) if i not in made_up]
    assert owner.tolist() == [i if i in real else -1 for i in range(2)]
    assert live.tolist() == [1, 64]
    counts, evict = (
        table[:, NAMES.index(name)].tolist() for name in ("count", "evict")
    )
    assert counts == [int(i in real) for i in range(2)]
    assert evict == [0, int(1 in real)]


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_signatures_and_squares_equal_the_oracle(
    head_dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    tokens, heads, group, bits = 5, 2, 3, 36
    rule = device_rule(
        resolve({"scoring": "instant", "budget": 64, "hash_bits": bits}, 16)
    )
    projection = make_projection(head_dim, bits, 0, True)
    # As the model passes them: slices of one fused projection, so strided by token.
    fused = torch.randn(tokens, heads * (group + 2), head_dim).to(dtype)
    q, k = fused[:, : heads * group], fused[:, heads * group : heads * (group + 1)]
    k[0] = 0.0  # every bit of zero is set
    signatures = torch.full((tokens, heads, group + 1, 2), POISON, dtype=torch.int32)
    squares = torch.full((tokens, heads, group + 1), float("nan"))
    tokens_of = Tokens.of(q, k, k)
    ops.sign(tokens_of, projection, Signed(signatures, squares), rule)
    rows = torch.cat([q.unflatten(1, (heads, group)), k[:, :, None]], dim=2).float()
    assert torch.equal(signatures, pack_bits(signature_bits(rows, projection)))
    torch.testing.assert_close(squares, rows.square().sum(-1))


@triton.jit
def _count_kernel(words, counts, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(counts + i, popcount(tl.load(words + i)))


def test_population_counts_are_right() -> None:
    torch.manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (256,)).int()
    words[:4] = torch.tensor([0, -1, 1, -(2**31)])
    counts = torch.full((256,), POISON, dtype=torch.int32)
    _count_kernel[(1,)](words, counts, N=256)
    assert counts.tolist() == [
        bin(word & 0xFFFFFFFF).count("1") for word in words.tolist()
    ]


@pytest.mark.parametrize("scoring", ["instant", "vote"])
def test_decode_never_asks_the_host_for_a_value(scoring: str) -> None:
    torch.manual_seed(0)
    policy = resolve(
        {"scoring": scoring, "budget": 36, "segment": 16, "sinks": 4, "recent": 8}, 16
    )
    layer = TritonLayer(policy, [40, 12], [60, 60], 1, 2, 16, 16, torch.float32)
    prompts = [
        tuple(torch.randn(n, heads, 16) for heads in (2, 1, 1)) for n in (40, 12)
    ]
    layer.step(prompts)
    token = tuple(torch.randn(2, heads, 16) for heads in (2, 1, 1))
    rule, ints = layer.rule, {"dtype": torch.int32}
    pieces, token_piece = (
        torch.zeros(2, ops.NUM_COLUMNS, **ints),
        torch.zeros(2, **ints),
    )
    done, live = torch.zeros(2, **ints), torch.zeros(2, **ints)
    signatures, squares = torch.zeros(2, 1, 3, 2, **ints), torch.zeros(2, 1, 3)
    where = torch.tensor([0, 1, 2], **ints)
    lens, prompt_lens = torch.tensor([41, 13], **ints), torch.tensor([40, 12], **ints)
    pages = layer.pages
    with forbidden_on_host() as device:
        tokens = Tokens.of(*map(device, token))
        pages = DevicePages(*map(device, (pages.k, pages.v, pages.tail)))
        plan = tuple(map(device, (done, pieces, live, token_piece)))
        kept = (torch.full((2,), n, **ints) for n in (policy.budget, policy.recent))
        requests = map(device, (where, lens, prompt_lens, *kept))
        ops.plan(*requests, *plan, rule, True)
        signed = Signed(device(signatures), device(squares))
        projection = device(layer.projection)
        if layer.rule.signs:
            ops.sign(tokens, projection, signed, rule)
        page = Page.of(pages)
        step = Step.of(plan[1], plan[3], device(layer.block_table), 1)
        estimate = layer.estimate._replace(projection=projection)
        ops.write(tokens, signed, step, page, rule, True)
        if layer.rule.votes:
            scratch = Scratch.of(rule, 2, 2, 16, torch.device("cpu"))
            scratch = scratch._make(map(device, scratch))
            ops.ballot(tokens, step, page, estimate, scratch, rule)
    assert live.tolist() == [36, 13]
    layer.computed = [41, 13]
    assert layer.live(0)[0][0, -1] == 40
    assert layer.live(1)[0][0, -1] == 12


def test_the_guard_on_the_host_works() -> None:
    with forbidden_on_host() as device:
        x = device(torch.ones(2))
        for ask in (x.tolist, x.cpu, x.numpy, x[0].item, lambda: bool(x[0])):
            with pytest.raises(AssertionError, match="host"):
                ask()


def test_a_rule_without_a_kernel_is_refused_in_one_sentence() -> None:
    policy = resolve({"name": "key_diff", "budget": 64}, 16)
    with pytest.raises(KVPolicyError, match=r"^--kv-policy: key_diff reads .*\.$"):
        device_rule(policy)


def test_pages_without_room_or_with_gaps_are_refused() -> None:
    cache = torch.zeros(2, 1, 16, 32)
    with pytest.raises(ValueError, match="no room"):
        view_pages(cache, words=2)
    with pytest.raises(ValueError, match="dense"):
        view_pages(torch.zeros(2, 2, 16, 32)[:, :, ::2], words=2)
