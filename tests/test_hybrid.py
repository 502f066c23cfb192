"""Hybrid models: sliding-window layers stay stock, full-attention ones are budgeted."""

from __future__ import annotations

from pathlib import Path

from support.engine import engine, greedy, runner_of, scheduler_of
from support.models import random_prompt
from support.oracle import Oracle, resolve

from hashevict_vllm.cache.prefix import PrefixCachingManager
from hashevict_vllm.cache.spec import BudgetedAttentionSpec

POLICY = {"budget": 201, "segment": 64}


def test_only_full_attention_layers_are_budgeted(gemma3: Path) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    with engine(gemma3, POLICY) as llm:
        kinds = {}
        for group in scheduler_of(llm).kv_cache_config.kv_cache_groups:
            for name in group.layer_names:
                kinds[int(name.split(".")[2])] = type(group.kv_cache_spec)
        managers = {
            type(m)
            for m in scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers
        }
        backends = {
            group.backend
            for groups in runner_of(llm).attn_groups
            for group in groups
            if isinstance(group.kv_cache_spec, SlidingWindowSpec)
        }
    assert kinds == {
        layer: BudgetedAttentionSpec if layer in (2, 5) else SlidingWindowSpec
        for layer in range(6)
    }
    assert managers == {PrefixCachingManager, SlidingWindowManager}
    assert backends == {CPUAttentionBackend}


def test_a_hybrid_model_equals_stock_under_budget(gemma3: Path) -> None:
    prompts = [random_prompt(n) for n in (20, 100, 300)]
    with engine(gemma3) as stock:
        expected = greedy(stock, prompts, 60)
    with engine(gemma3, {"budget": 384}) as llm:
        assert greedy(llm, prompts, 60) == expected


def test_a_hybrid_model_equals_the_oracle_over_budget(gemma3: Path) -> None:
    oracle, policy = Oracle(gemma3), resolve(POLICY)
    prompts = []
    for length in (150, 400):
        seed = 0
        while not oracle.is_stable(random_prompt(length, seed), policy, 100):
            seed += 1
        prompts.append(random_prompt(length, seed))
    expected = [oracle.greedy(prompt, policy, 100) for prompt in prompts]
    with engine(gemma3, POLICY, max_num_batched_tokens=100) as llm:
        assert greedy(llm, prompts, 100) == expected
