"""Numbers of prefix caching, against the plan of every step, token by token."""

from __future__ import annotations

from typing import Any

import pytest
from support.oracle import resolve

from hashevict_vllm.plan import cut_chunk
from hashevict_vllm.reuse import Reuse

N = 32
POLICIES: dict[str, dict[str, Any]] = {
    "segments": {"budget": 201, "segment": 64},
    "budget of whole segments": {"budget": 192, "segment": 64},
    "held": {"budget": 201, "segment": "prompt"},
    "token by token": {"budget": 192, "segment": 1},
    "beyond the horizon": {"budget": 320, "segment": 96},
}
PROMPTS = (1, 5, 17, 31, 32, 33, 64, 190, 192, 193, 200, 201, 202, 256, 257, 319, 320)
PROMPTS += (321, 384, 385, 400, 448, 449, 513)


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Any:
    return resolve(POLICIES[request.param])


def test_raw_blocks_are_those_that_no_step_has_written_to_again(policy: Any) -> None:
    for prompt_len in PROMPTS:
        reuse, dirty = Reuse(policy, N, prompt_len), set()
        raw = set(range(-(-reuse.raw_tokens // N)))
        voters = []
        for t in range(prompt_len + 260):
            (piece,) = cut_chunk(policy, 0, 0, t, t + 1, prompt_len)
            if piece.evict or piece.compact:
                dirty.update(range(-(-policy.budget // N)))
            elif piece.slot != t:
                dirty.add(piece.slot // N)
            voters += [t] if piece.first_voter == 0 else []
            end = t + 1
            assert dirty & raw <= set(range(reuse.overwritten(end)))
            if end < reuse.raw_tokens or end <= min(policy.budget, prompt_len):
                assert not dirty
                assert reuse.overwritten(end) == 0
        assert reuse.first_voter == voters[0]
        assert reuse.longest_raw_hit <= min(voters[0], reuse.raw_tokens)
        assert reuse.never_overwrites(voters[0])
        assert not reuse.never_overwrites(voters[0] + 1)


def test_snapshots_are_reductions_that_the_prompt_outlives(policy: Any) -> None:
    for prompt_len in PROMPTS:
        reuse = Reuse(policy, N, prompt_len)
        reduced = [
            t + 1
            for t in range(prompt_len - 1)
            if next(cut_chunk(policy, 0, 0, t, t + 1, prompt_len)).compact
        ]
        assert list(reuse.snapshots(prompt_len + 9)) == reduced[::-1]
        for end in range(prompt_len + 40):
            assert reuse.is_snapshot(end) == (end in reduced)


def test_chunks_stop_where_what_they_fill_can_be_cached(policy: Any) -> None:
    for prompt_len in PROMPTS:
        reuse = Reuse(policy, N, prompt_len)
        for longest in (1, 7, 64, 100, 600):
            start = 0
            while start < prompt_len:
                end = reuse.chunk_end(start, min(start + longest, prompt_len))
                assert start < end <= min(start + longest, prompt_len)
                filled = range(start // N, min(end, reuse.raw_tokens) // N)
                lost = set(filled) & set(range(reuse.overwritten(end)))
                assert not lost or end - start < N
                start = end
