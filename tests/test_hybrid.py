"""Hybrid models: sliding-window layers stay stock, full-attention ones are budgeted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine import engine, greedy, runner_of, scheduler_of
from support.models import make_gemma4, random_prompt
from support.oracle import Oracle, resolve

from hashevict_vllm.cache.prefix import PrefixCachingManager
from hashevict_vllm.cache.spec import BudgetedAttentionSpec
from hashevict_vllm.config import KVPolicyError

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


def test_full_requests_are_refused_at_start_where_groups_share_too_small_a_pool(
    gemma3: Path,
) -> None:
    options = {"num_gpu_blocks_override": 100, "max_num_batched_tokens": 256}
    sentence = r"^--kv-policy-config.allow_full: a request of 4096 tokens .* has 99; "
    with (
        pytest.raises(KVPolicyError, match=sentence),
        engine(gemma3, {**POLICY, "allow_full": True}, **options),
    ):
        pass


def poison_free_blocks(llm: Any) -> None:
    """Fill K/V and padding of every block but the null block with NaNs of bfloat16."""
    layers = runner_of(llm).compilation_config.static_forward_context
    for layer in layers.values():
        cache = layer.kv_cache
        stride = cache.stride(0) * cache.element_size() // 2
        shorts = torch.empty(0, dtype=torch.int16).set_(cache.untyped_storage())
        first = cache.storage_offset() * cache.element_size() // 2
        pages = shorts[first : first + len(cache) * stride].view(-1, stride)
        pages[1::2], pages[2::2] = 0x7FC0, -1


@pytest.mark.parametrize(
    ("sliding", "full"), [((4, 64), (1, 112)), ((1, 64), (4, 112))], ids=str
)
def test_stale_bits_of_shared_blocks_change_nothing(
    sliding: tuple[int, int], full: tuple[int, int], tmp_path: Path
) -> None:
    """Where one group keeps metadata another keeps K/V, of either size."""
    model = make_gemma4(tmp_path / "model", sliding, full)
    prompts = [random_prompt(n, seed=9) for n in (50, 100, 300)]
    options = {"dtype": "bfloat16", "num_gpu_blocks_override": 80}
    policy = {"budget": 192, "segment": 64}
    with engine(model, policy, max_model_len=600, **options) as llm:
        clean = greedy(llm, prompts, 20)
        assert all(len(set(tokens)) > 1 or tokens[0] for tokens in clean)  # no NaN
        greedy(llm, [random_prompt(400, seed) for seed in range(3)], 20)
        assert greedy(llm, prompts, 20) == clean
        poison_free_blocks(llm)
        assert greedy(llm, prompts, 20) == clean


def test_blocks_are_zeroed_only_where_other_groups_share_a_budgeted_one() -> None:
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        SlidingWindowSpec,
    )

    shape = {"block_size": 32, "num_kv_heads": 1, "head_size": 32}
    full = FullAttentionSpec(**shape, dtype=torch.bfloat16)
    sliding = SlidingWindowSpec(**shape, dtype=torch.bfloat16, sliding_window=64)
    budgeted = BudgetedAttentionSpec.from_stock(full, resolve(POLICY))

    def zeroes(*specs: Any) -> bool:
        groups = [KVCacheGroupSpec([str(i)], spec) for i, spec in enumerate(specs)]
        config = KVCacheConfig(
            num_blocks=8, kv_cache_tensors=[], kv_cache_groups=groups
        )
        return config.needs_kv_cache_zeroing

    assert zeroes(budgeted, sliding)
    assert not zeroes(budgeted)
    assert not zeroes(full, sliding)
