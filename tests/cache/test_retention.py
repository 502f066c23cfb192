"""What is read of a live request's pages: the positions and votes of the oracle."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.engine import engine, scheduler_of
from support.models import random_prompt
from support.oracle import Oracle, resolve

from hashevict_vllm.cache import retention
from hashevict_vllm.cache.retention import LayerTail, layer_index, merge, spaced
from hashevict_vllm.server.pace import (
    HTTP_S,
    INTERVAL_S,
    PATIENCE_S,
    SHARE,
    Busy,
    Pace,
)
from hashevict_vllm.server.retention import (
    MAX_CELLS,
    Question,
    TooLarge,
    answer,
)

POLICY = {"budget": 160, "segment": 64, "recent": 8}
PROMPT = 333
TOKENS = 60


@pytest.fixture(scope="module")
def llm(llama: Path) -> Any:
    """Reads prompts 48 tokens at a time, so that a segment is open between steps."""
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 48}
    with engine(llama, POLICY, **options) as made:
        yield made


def add(llm: Any, name: str, prompt: list[int], tokens: int) -> Any:
    """A request of the engine that has just been added."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
    )
    llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
    return list(scheduler_of(llm).requests.values())[-1]


def read(llm: Any, request: Any, layers: Any = None, votes: bool = True) -> Any:
    """As the HTTP server asks for it."""
    core = llm.llm_engine.engine_core.engine_core
    return core.kv_policy_retention(request.request_id, layers, votes)


def finish(llm: Any) -> None:
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def arrays(found: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Positions and votes [H, n] of each layer."""
    return [
        (
            np.frombuffer(positions, np.int32).reshape(heads, -1),
            np.frombuffer(votes, np.float32).reshape(heads, -1),
        )
        for _, heads, positions, votes in found["layers"]
    ]


def test_the_positions_and_votes_are_those_of_the_oracle(
    llm: Any, llama_oracle: Oracle
) -> None:
    request = add(llm, "mine", random_prompt(PROMPT), TOKENS + 9)
    other = add(llm, "other", random_prompt(200, seed=7), TOKENS + 90)
    while request.num_output_tokens < TOKENS:
        llm.llm_engine.step()
    found, others = read(llm, request), read(llm, other)
    expected = llama_oracle.greedy(random_prompt(PROMPT), resolve(POLICY), TOKENS)
    assert list(request.output_token_ids) == expected
    assert found["tokens"] == PROMPT + TOKENS - 1
    assert found["live_slots"] == found["budget"] == POLICY["budget"]
    assert found["blocks"] == POLICY["budget"] // 32
    for index, (positions, votes) in enumerate(arrays(found)):
        slots = llama_oracle.layers[index].slots
        order = positions.argsort(axis=1)
        by_age = slots.position.argsort(dim=1)
        assert np.array_equal(
            np.take_along_axis(positions, order, 1), slots.position.gather(1, by_age)
        )
        assert np.take_along_axis(votes, order, 1) == pytest.approx(
            slots.votes.gather(1, by_age).numpy(), abs=1e-4
        )
    assert others["layers"] != found["layers"]
    finish(llm)
    assert read(llm, request) is None


def test_of_an_open_segment_what_arrived_is_held_and_what_is_lost_is_not(
    llm: Any,
) -> None:
    request = add(llm, "reading", random_prompt(PROMPT), 2)
    waiting = read(llm, request)
    assert (waiting["tokens"], waiting["live_slots"], waiting["layers"]) == (0, 0, [])
    while request.num_computed_tokens < 240:  # 192 are reduced, 48 of a segment came
        llm.llm_engine.step()
    found = read(llm, request)
    assert found["tokens"] == 240
    assert found["live_slots"] == POLICY["budget"] + 48
    shown = answer("x", found, Question(columns=240))
    assert len(shown.held[0]) == 240
    for held, heads in zip(shown.held, shown.kv_heads, strict=True):
        assert held[192:] == [heads] * 48
        assert sum(held) == heads * (POLICY["budget"] + 48)
    finish(llm)


def test_an_answer_is_cut_to_layers_positions_and_columns(llm: Any) -> None:
    request = add(llm, "cut", random_prompt(PROMPT), 20)
    while request.num_output_tokens < 10:
        llm.llm_engine.step()
    whole, last = read(llm, request), read(llm, request, layers=[1, 99], votes=False)
    finish(llm)
    asked = Question(start=100, stop=200, columns=30, bitmap=True, slots=True)
    shown, single = answer("x", whole, asked), answer("x", last, asked)
    assert single.layers == [1]
    assert single.held == shown.held[1:2]
    assert shown.slots[0].votes
    assert single.slots[0].votes is None
    assert (shown.start, shown.stop, shown.width) == (100, 200, 4)
    for row, heads in enumerate(shown.kv_heads):
        bits = np.frombuffer(base64.b64decode(shown.bitmaps[row]), "u1")
        mask = np.unpackbits(bits.reshape(heads, -1), axis=1)[:, :100]
        assert shown.held[row] == mask.reshape(heads, 25, 4).sum((0, 2)).tolist()
        for listed in (s for s in shown.slots if s.layer == shown.layers[row]):
            held = (np.flatnonzero(mask[listed.head]) + 100).tolist()
            assert listed.positions == held
            assert len(listed.votes) == len(held)


def test_what_is_too_large_is_refused_or_thinned(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = add(llm, "large", random_prompt(PROMPT), 20)
    while request.num_output_tokens < 10:
        llm.llm_engine.step()
    found = read(llm, request)
    heads = sum(heads for _, heads, _, _ in found["layers"])
    monkeypatch.setattr(retention, "MAX_SLOTS", POLICY["budget"] * heads // 2)
    assert len(read(llm, request)["layers"]) == len(found["layers"]) // 2
    every = list(range(len(found["layers"])))
    assert read(llm, request, layers=every)["refused"] == POLICY["budget"] * heads
    finish(llm)
    for bound in ("MAX_SLOTS_LISTED", "MAX_BITMAP_BYTES"):
        monkeypatch.setattr(f"hashevict_vllm.server.retention.{bound}", 100)
    for asked in (Question(slots=True), Question(bitmap=True)):
        with pytest.raises(TooLarge, match="name fewer layers, or a shorter range"):
            answer("x", found, asked)
    columns = len(answer("x", found, Question(columns=MAX_CELLS)).held[0])
    assert columns == found["tokens"]


def test_ranks_bring_their_heads_and_copies_of_heads_count_once() -> None:
    def tail(layer: int, heads: int, byte: bytes) -> LayerTail:
        return LayerTail(layer, heads, byte * heads, None)

    stages = [[tail(0, 2, b"a")], [tail(0, 2, b"b")], [tail(1, 2, b"c")], []]
    assert merge(stages, ranks=2, replicas=1) == [
        LayerTail(0, 4, b"aabb", None),
        tail(1, 2, b"c"),
    ]
    copies = [[tail(0, 1, name)] for name in (b"a", b"a", b"b", b"b")]
    assert merge(copies, ranks=4, replicas=2) == [LayerTail(0, 2, b"ab", None)]
    assert [spaced(30, 30), spaced(7, 3), spaced(3, 9)] == [
        list(range(30)),
        [0, 3, 6],
        [0, 1, 2],
    ]
    assert layer_index("language_model.model.layers.17.self_attn.attn") == 17


def test_reads_take_a_bounded_share_of_the_time_and_each_request_its_turn() -> None:
    now, cost, reads, refusals = 0.0, 0.004, [0] * 64, 0
    pace = Pace(clock=lambda: now)
    comes = [i / 64 for i in range(64)]  # when who looks on will ask
    while now < 200:
        who = comes.index(min(comes))
        now = comes[who]
        try:
            comes[who] += 1 + pace.admit(str(who))
        except Busy as busy:
            refusals += 1
            comes[who] += math.ceil(busy.retry_after_s)
        else:
            pace.account(cost)
            reads[who] += 1
    assert sum(reads) * (cost + HTTP_S) / now == pytest.approx(SHARE, rel=0.1)
    assert max(reads) <= min(reads) + 2
    assert refusals <= 1.2 * sum(reads)


def test_a_request_is_read_with_pauses_and_a_long_queue_is_refused() -> None:
    now = 0.0
    pace = Pace(clock=lambda: now)
    assert pace.admit("a") == 0
    with pytest.raises(Busy) as caught:
        pace.admit("a")
    assert 0 < caught.value.retry_after_s <= INTERVAL_S
    assert 0 < pace.admit("b") <= PATIENCE_S
    pace.account(2 * PATIENCE_S * SHARE)
    with pytest.raises(Busy) as caught:
        pace.admit("c")
    now += caught.value.retry_after_s
    assert pace.admit("c") == 0


def test_marks_of_others_in_a_shared_block_are_not_this_requests(llama: Path) -> None:
    from vllm import SamplingParams

    policy = {"budget": 160, "segment": "prompt", "allow_full": True}
    options = {"enable_prefix_caching": True, "max_num_seqs": 2}
    with engine(llama, policy, **options) as llm:
        add(llm, "voters", random_prompt(PROMPT), 2)
        finish(llm)
        full = SamplingParams(
            temperature=0,
            max_tokens=9,
            detokenize=False,
            extra_args={"kv_budget": "full"},
        )
        prompt = {"prompt_token_ids": random_prompt(PROMPT)}
        llm.llm_engine.add_request("full", prompt, full)
        (request,) = scheduler_of(llm).requests.values()
        llm.llm_engine.step()
        pool = scheduler_of(llm).kv_cache_manager.block_pool
        assert any(block.ref_cnt and block.block_hash for block in pool.blocks)
        found = read(llm, request)
        for positions, _ in arrays(found):
            assert (positions == np.arange(PROMPT)).all()
        finish(llm)
