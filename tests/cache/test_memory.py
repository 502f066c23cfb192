"""Memory: bounds at every step, nothing leaks, freed blocks carry nothing over."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm.logger
from support.engine import engine, greedy, runner_of, scheduler_of
from support.models import random_prompt
from support.oracle import resolve

from hashevict_vllm.cache.page import tail_bytes
from hashevict_vllm.plan import occupied_slots
from hashevict_vllm.policies import make_rule

BLOCK = 32


def manager_of(llm: Any) -> Any:
    (manager,) = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers
    return manager


def free_blocks(llm: Any) -> int:
    return manager_of(llm).block_pool.get_num_free_blocks()


def add(llm: Any, request_id: str, prompt: list[int], tokens: int) -> None:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
    )
    llm.llm_engine.add_request(request_id, {"prompt_token_ids": prompt}, params)


def assert_forgotten(manager: Any) -> None:
    """The manager knows no request any more."""
    kept = {
        name: value
        for name, value in vars(manager).items()
        if isinstance(value, (dict, set)) and value
    }
    assert not kept
    assert not manager._ledger.fresh | manager._ledger.private


@pytest.mark.parametrize(
    "policy",
    [
        {"budget": 201, "segment": 64},
        {"budget": 201, "segment": "prompt"},
        {"budget": 192, "segment": 1},
    ],
    ids=["segments", "prompt held", "token by token"],
)
def test_blocks_held_never_exceed_the_contract(
    policy: dict[str, Any], llama: Path
) -> None:
    resolved = resolve(policy)
    scratch = resolved.segment if resolved.segment > 1 else 0
    steps = 0
    with engine(llama, policy, max_num_seqs=8, max_num_batched_tokens=128) as llm:
        before = free_blocks(llm)
        for i, length in enumerate((20, 150, 260, 500, 900, 3000)):
            add(llm, str(i), random_prompt(length), 250)
        scheduler, manager = scheduler_of(llm), manager_of(llm)
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            steps += 1
            for request in scheduler.running:
                held = len(manager.req_to_blocks[request.request_id])
                bound = -(-resolved.budget // BLOCK)
                # The scratch is given back when the step after the prompt is planned.
                if request.num_output_tokens <= 1:
                    reading = min(request.num_prompt_tokens, resolved.budget + scratch)
                    bound = max(bound, -(-reading // BLOCK))
                assert held <= bound
                # Nor less than what the worker has in use.
                counts = request.num_computed_tokens, request.num_prompt_tokens
                assert held * BLOCK >= occupied_slots(resolved, *counts)
        assert free_blocks(llm) == before
    assert steps > 250


@pytest.mark.parametrize("caching", [False, True], ids=["", "prefix caching"])
def test_no_block_leaks_after_250_requests_with_aborts_and_preemptions(
    caching: bool, llama: Path
) -> None:
    policy = {"budget": 96, "segment": 32, "sinks": 0, "recent": 8}
    with engine(
        llama,
        policy,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        num_gpu_blocks_override=20,
        enable_prefix_caching=caching,
    ) as llm:
        before, preemptions = free_blocks(llm), 0
        scheduler = scheduler_of(llm)
        stock = scheduler._preempt_request

        def preempt(*args: Any, **kwargs: Any) -> None:
            nonlocal preemptions
            preemptions += 1
            stock(*args, **kwargs)

        scheduler._preempt_request = preempt
        submitted = step = 0
        while submitted < 250 or llm.llm_engine.has_unfinished_requests():
            while (
                submitted < 250 and len(scheduler.running) + len(scheduler.waiting) < 20
            ):
                length = 5 + 37 * submitted % 180
                add(llm, f"r{submitted}", random_prompt(length), 5 + submitted % 110)
                submitted += 1
            llm.llm_engine.step()
            step += 1
            if step % 7 == 0 and scheduler.running:
                victim = scheduler.running[step % len(scheduler.running)]
                llm.llm_engine.abort_request([victim.request_id], internal=True)
        assert preemptions > 0
        assert free_blocks(llm) == before
        assert_forgotten(manager_of(llm))


def test_a_request_of_eight_times_the_pool_is_served(llama: Path) -> None:
    # 16 usable blocks are 512 tokens uncompressed.
    policy = {"budget": 256, "segment": 128}
    with engine(llama, policy, num_gpu_blocks_override=17) as llm:
        (tokens,) = greedy(llm, [random_prompt(3000)], 1096)
    assert len(tokens) == 1096


def test_a_pool_that_cannot_hold_the_bounded_need_is_refused_at_start(
    llama: Path,
) -> None:
    with (
        pytest.raises(ValueError, match="KV cache"),
        engine(llama, {"budget": 1024}, num_gpu_blocks_override=17),
    ):
        pass


@pytest.mark.parametrize(
    "options",
    [
        {"hash_bits": 8},
        {"hash_bits": 64},
        {"scoring": "instant", "hash_bits": 128},
    ],
    ids=str,
)
def test_metadata_take_at_most_four_percent_of_a_bf16_page_at_head_size_128(
    options: dict[str, Any],
) -> None:
    rule = make_rule(resolve({"budget": 1024, **options}))
    kv = 8 * 16 * 2 * 128 * 2
    assert tail_bytes(8, 16, rule.words) / kv <= 0.04


def test_the_page_and_the_pool_are_sized_with_their_metadata(llama: Path) -> None:
    with engine(llama, {"budget": 256}) as llm:
        spec = manager_of(llm).kv_cache_spec
        kv = 2 * BLOCK * 2 * 32 * 4  # KV heads x slots x (K and V) x D x float32
        words = 2 + 1 + 1 + 1  # signature, numbers, votes, position
        tail = 2 * BLOCK * words * 4  # KV heads x slots x bytes
        assert spec.page_size_bytes == kv + tail
        for cache in runner_of(llm).kv_caches:
            assert cache.stride(0) * cache.element_size() == kv + tail


def poison(llm: Any, byte: int) -> None:
    """Overwrite the whole pool, signatures and positions included."""
    for cache in runner_of(llm).kv_caches:
        raw = torch.empty(0, dtype=torch.uint8).set_(cache.untyped_storage())
        raw.fill_(byte)


@pytest.mark.parametrize("byte", [0x00, 0x41, 0x7F])
def test_stale_bytes_in_blocks_change_nothing(byte: int, llama: Path) -> None:
    prompts = [random_prompt(n) for n in (20, 150, 333, 700)]
    policy = {"budget": 201, "segment": 64}
    with engine(llama, policy, max_num_batched_tokens=100) as llm:
        expected = greedy(llm, prompts, 120)
        poison(llm, byte)
        assert greedy(llm, prompts, 120) == expected


def test_blocks_reused_by_another_request_leak_nothing(llama: Path) -> None:
    policy = {"budget": 128, "segment": 64}
    target = random_prompt(300)
    with engine(llama, policy, num_gpu_blocks_override=8) as llm:
        alone = greedy(llm, [target], 100)
    with engine(llama, policy, num_gpu_blocks_override=8) as llm:
        for seed in range(4):  # every block of the pool has held other tokens
            greedy(llm, [random_prompt(400, seed)], 30)
        assert greedy(llm, [target], 100) == alone


def test_the_log_says_once_that_prompts_are_longer_than_what_is_held(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    logger = logging.getLogger("vllm.hashevict_vllm.cache.manager")
    vllm.logger._print_warning_once.cache_clear()
    with engine(llama, {"budget": 128, "segment": 64}) as llm:
        # Handlers would see a sentence once or twice, as vLLM's logger is set up.
        monkeypatch.setattr(logger, "warning", lambda s, *n, **_: said.append(s % n))
        greedy(llm, [random_prompt(192)], 2)
        assert not said
        greedy(llm, [random_prompt(193), random_prompt(300)], 2)
    (sentence,) = said
    assert "Prompts longer than 192 tokens are cut back" in sentence


def test_the_log_says_what_the_budget_buys(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from hashevict_vllm.cache.capacity import describe_capacity

    policy = {"budget": 256, "segment": 256}
    with engine(llama, policy, num_gpu_blocks_override=65) as llm:
        core = llm.llm_engine.engine_core.engine_core
        config = scheduler_of(llm).kv_cache_config
        sentence = describe_capacity(core.vllm_config, config)
    assert sentence is not None
    assert "KV budget: 256 tokens per KV head" in sentence
    assert "at most 8 blocks" in sentence
    assert "serves 8.0 requests of any length at once" in sentence
    # 65 pages of 17,664 bytes are 70 of stock vLLM's 16,384, one its null block.
    assert "stock vLLM 0.54 of 4096 tokens" in sentence


def test_capacity_is_capped_by_the_longest_request(llama: Path) -> None:
    """A budget that no request fills costs what the longest request holds."""
    from hashevict_vllm.cache.capacity import describe_capacity

    with engine(llama, {"budget": 4 * 10**9}, max_model_len=512) as llm:
        core = llm.llm_engine.engine_core.engine_core
        config = scheduler_of(llm).kv_cache_config
        sentence = describe_capacity(core.vllm_config, config)
        assert sentence is not None
        page = 2 * manager_of(llm).kv_cache_spec.page_size_bytes  # two layers
        assert "KV budget: 512 tokens per KV head" in sentence
        assert f"at most 16 blocks ({16 * page / 2**20:.1f} MiB" in sentence
        assert len(greedy(llm, [random_prompt(400)], 50)[0]) == 50


def test_a_share_is_of_the_length_that_auto_settles_on(llama: Path) -> None:
    """33 pages, one of them the null block: 1,024 tokens to read the longest prompt."""
    policy = {"budget": "50%", "segment": 256}
    short = {"num_gpu_blocks_override": 33, "max_model_len": -1}
    with engine(llama, policy, **short) as llm:
        length = llm.llm_engine.vllm_config.model_config.max_model_len
        spec = manager_of(llm).kv_cache_spec
        assert spec.policy.budget == length // 2
        # 768 tokens of budget and a segment fill the pool: no longer length fits.
        assert length == 2 * 768 + 1
        (builder,) = {
            group.get_metadata_builder().kv_cache_spec.policy
            for groups in runner_of(llm).attn_groups
            for group in groups
        }
        assert builder == spec.policy
        prompt = random_prompt(1200)
        tokens = greedy(llm, [prompt], 100)
    fixed = {"budget": 768, "segment": 256}
    with engine(llama, fixed, num_gpu_blocks_override=33, max_model_len=1537) as llm:
        assert greedy(llm, [prompt], 100) == tokens
