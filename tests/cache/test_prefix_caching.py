"""Prefix caching with a budget: the tokens of a server without it, sooner."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engine import engine, greedy, runner_of, scheduler_of
from support.models import random_prompt
from support.oracle import Oracle, resolve

from hashevict_vllm.kernels.codes import OCTAVES
from hashevict_vllm.kernels.pages import view_pages
from hashevict_vllm.policies import make_rule

SEGMENTS = {"budget": 201, "segment": 64}
HELD = {"budget": 201, "segment": "prompt"}
TURNS = (260, 40, 70, 300)
REPLY = 24
# Shorter than, equal to and longer than a segment, two, and the budget.
LENGTHS = (50, 64, 100, 128, 201, 230, 256, 400, 641)


def outputs(
    llm: Any, prompts: list[list[int]], tokens: int = REPLY, **options: Any
) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(
        top_k=1, max_tokens=tokens, ignore_eos=True, detokenize=False, **options
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, params, use_tqdm=False)


def tokens_of(results: list[Any]) -> list[list[int]]:
    return [list(one.token_ids) for result in results for one in result.outputs]


def chat(llm: Any) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """A chat of four turns: its prompts, replies and tokens that were hit."""
    said, prompts, replies, hits = [], [], [], []
    for i, turn in enumerate(TURNS):
        said = said + random_prompt(turn, seed=10 + i)
        (result,) = outputs(llm, [said])
        prompts.append(said)
        replies += tokens_of([result])
        hits.append(result.num_cached_tokens)
        said = said + replies[-1]
    return prompts, replies, hits


def shared(length: int, seed: int) -> list[int]:
    """A prompt that begins as the others do."""
    return random_prompt(300, seed=5) + random_prompt(length, seed=seed)


def work(llm: Any) -> Iterator[list[list[int]]]:
    """What a server may be asked, every answer a list of tokens."""
    yield chat(llm)[1]
    together = [shared(10 + 37 * i % 120, 20 + i) for i in range(7)]
    together += [together[2], together[2], random_prompt(650, seed=5)]
    yield greedy(llm, together, 40)
    yield greedy(llm, together, 40)
    for length in LENGTHS:
        yield greedy(llm, [random_prompt(length, seed=9)], 20)
    yield tokens_of(outputs(llm, [shared(30, 20)], n=3))
    # Budgets that are reached in decode, and pools that then turn out too small.
    yield greedy(llm, [random_prompt(40 + 30 * i, seed=9) for i in range(6)], 150)


@pytest.fixture(scope="module")
def uncached(llama: Path) -> dict[str, list[list[list[int]]]]:
    """Answers with prefix caching off, by segment."""
    answers = {}
    for name, policy in (("64", SEGMENTS), ("prompt", HELD)):
        with engine(llama, policy, max_num_seqs=8) as llm:
            answers[name] = list(work(llm))
    return answers


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "small chunks": (SEGMENTS, {"max_num_batched_tokens": 64}),
    "blocks of 64": (SEGMENTS, {"block_size": 64, "max_num_batched_tokens": 300}),
    "whole prompts": (HELD, {}),
    "blocks of 128": (HELD, {"block_size": 128, "max_num_batched_tokens": 300}),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_without_prefix_caching(
    name: str, llama: Path, uncached: dict[str, list[list[list[int]]]]
) -> None:
    policy, options = CASES[name]
    with caching_engine(llama, policy, **options) as llm:
        free = free_blocks(llm)
        assert list(work(llm)) == uncached[str(policy["segment"])]
        assert free_blocks(llm) == free


def caching_engine(model: Path, policy: dict[str, Any] | None, **options: Any) -> Any:
    return engine(
        model, policy, **{"max_num_seqs": 8, "enable_prefix_caching": True, **options}
    )


def free_blocks(llm: Any) -> int:
    return scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()


def test_tokens_of_a_chat_are_the_oracles(llama: Path, llama_oracle: Oracle) -> None:
    policy = resolve(SEGMENTS)
    with caching_engine(llama, SEGMENTS) as llm:
        prompts, replies, hits = chat(llm)
    assert min(hits[1:]) > 0
    for prompt, reply in zip(prompts, replies, strict=True):
        if llama_oracle.is_stable(prompt, policy, REPLY):
            assert llama_oracle.greedy(prompt, policy, REPLY) == reply
    assert llama_oracle.is_stable(prompts[-1], policy, REPLY)


def test_pools_without_room_for_copies_change_nothing(
    llama: Path, uncached: dict[str, list[list[list[int]]]]
) -> None:
    options = {"num_gpu_blocks_override": 22, "max_model_len": 1024}
    with caching_engine(llama, SEGMENTS, **options) as llm:
        preempted = 0
        stock = scheduler_of(llm)._preempt_request

        def preempt(*args: Any, **kwargs: Any) -> None:
            nonlocal preempted
            preempted += 1
            stock(*args, **kwargs)

        scheduler_of(llm)._preempt_request = preempt
        assert list(work(llm)) == uncached["64"]
        assert free_blocks(llm) == 21
    assert preempted > 0


@pytest.mark.parametrize("policy", [SEGMENTS, HELD], ids=["segments", "held"])
def test_a_turn_hits_what_the_turn_before_has_read(
    policy: dict[str, Any], llama: Path
) -> None:
    resolved = resolve(policy)
    with caching_engine(llama, policy) as llm:
        prompts, _, hits = chat(llm)
    block = 32
    for before, prompt, hit in zip(prompts, prompts[1:], hits[1:], strict=False):
        most = min(len(before), len(prompt) - resolved.window) // block * block
        if policy is SEGMENTS:  # beyond the first reduction: the last snapshot
            most = max(len(before) - 1, 0) // 64 * 64
            most = min(most, (len(prompt) - 1) // 64 * 64)
        assert hit == most


def test_more_sinks_than_a_block_change_nothing(llama: Path) -> None:
    policy = {**SEGMENTS, "sinks": 40}
    with engine(llama, policy, max_num_seqs=8) as llm:
        expected = chat(llm)[1]
    with caching_engine(llama, policy, max_num_batched_tokens=24) as llm:
        _, replies, hits = chat(llm)
    assert replies == expected
    assert min(hits[1:]) > 0


def test_below_the_budget_tokens_and_hits_are_stocks(llama: Path) -> None:
    with caching_engine(llama, None) as llm:
        expected = chat(llm)
        salted = salted_hits(llm)
    with caching_engine(llama, {"budget": 1024}) as llm:
        assert chat(llm) == expected
        assert salted_hits(llm) == salted
        assert (
            outputs(llm, expected[0][-1:], prompt_logprobs=1)[0].num_cached_tokens == 0
        )
    assert expected[2][-1] > 0
    assert salted == [0, 288, 0]


def salted_hits(llm: Any) -> list[int]:
    """Hits of one prompt with a salt, the same, and another; after a reset."""
    from vllm import SamplingParams

    assert llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    prompt = random_prompt(300, seed=4)
    return [
        llm.generate(
            {"prompt_token_ids": prompt, "cache_salt": salt}, params, use_tqdm=False
        )[0].num_cached_tokens
        for salt in ("a", "a", "b")
    ]


def test_stale_bytes_in_recycled_blocks_change_nothing(llama: Path) -> None:
    """Signatures, positions and votes are NaN; K and V are not, for stock's kernel."""
    with caching_engine(llama, SEGMENTS) as llm:
        expected = list(work(llm))
        pool = scheduler_of(llm).kv_cache_manager.block_pool
        idle = [b.block_id for b in pool.blocks if b.ref_cnt == 0 and not b.block_hash]
        cached = [b.block_id for b in pool.blocks if b.block_hash]
        words = make_rule(resolve(SEGMENTS)).words
        for cache in runner_of(llm).kv_caches:
            pages = view_pages(cache, words)
            cache[idle] = 3e38
            pages.tail[idle] = -1
            # Votes of raw blocks are nobody's.
            raw = [i for i in cached if pool.blocks[i].block_hash_num_tokens]
            octaves = pages.tail[raw, :, words - 1] & OCTAVES
            pages.tail[raw, :, words - 1] = octaves | 0x7FC00000
        assert list(work(llm)) == expected


def test_a_hybrid_model_answers_as_without_prefix_caching(gemma3: Path) -> None:
    prompts = [shared(40, 20), shared(90, 21), shared(40, 20)]
    with engine(gemma3, SEGMENTS, max_num_seqs=8) as llm:
        expected = (chat(llm)[1], greedy(llm, prompts, 60), greedy(llm, prompts, 60))
    with caching_engine(gemma3, SEGMENTS, max_num_batched_tokens=300) as llm:
        free = free_blocks(llm)
        _, replies, hits = chat(llm)
        assert (replies, greedy(llm, prompts, 60), greedy(llm, prompts, 60)) == expected
        assert free_blocks(llm) == free
    assert min(hits[1:]) > 0


def test_a_hybrid_model_that_holds_its_prompts_hits_what_stock_hits(
    gemma3: Path,
) -> None:
    with caching_engine(gemma3, None) as llm:
        stock = chat(llm)[2]
    with caching_engine(gemma3, HELD) as llm:
        assert chat(llm)[2] == stock
    assert min(stock[1:]) > 0


def test_a_resumed_request_asks_for_no_more_than_it_holds(llama: Path) -> None:
    """Its output is no prompt: C + S blocks are neither needed nor asked for."""
    policy = {"budget": 128, "segment": 512, "recent": 32}
    with engine(llama, policy, num_gpu_blocks_override=24, max_num_seqs=2) as llm:
        scheduler = scheduler_of(llm)
        manager = scheduler.kv_cache_manager
        asked: list[int] = []
        (single,) = manager.coordinator.single_type_managers
        stock = single.get_num_blocks_to_allocate

        def ask(request_id: str, *args: Any, **kwargs: Any) -> int:
            asked.append(stock(request_id, *args, **kwargs))
            return asked[-1]

        single.get_num_blocks_to_allocate = ask
        preempt_after(llm, 400)
        (tokens,) = greedy(llm, [random_prompt(100, seed=3)], 700)
    assert len(tokens) == 700
    assert max(asked) == math.ceil(128 / 32)


def preempt_after(llm: Any, num_tokens: int) -> None:
    """Preempt the first request that has so many tokens, once."""
    scheduler, done = scheduler_of(llm), []
    stock = scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        for request in list(scheduler.running):
            if not done and request.num_computed_tokens >= num_tokens:
                done.append(request)
                scheduler.running.remove(request)
                scheduler._preempt_request(request, 0.0)
        return stock(*args, **kwargs)

    scheduler.schedule = schedule
