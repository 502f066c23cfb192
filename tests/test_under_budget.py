"""A request that stays within the budget is stock vLLM; so is a policy that is off."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.engine import engine, greedy, runner_of, scheduler_of
from support.models import random_prompt

PROMPTS = [random_prompt(n) for n in (20, 100, 256, 700, 1300, 2500)]


def test_tokens_are_identical_to_stock_when_the_budget_is_never_reached(
    llama: Path,
) -> None:
    with engine(llama) as stock:
        expected = greedy(stock, PROMPTS)
    with engine(llama, {"budget": 2816}) as llm:
        assert greedy(llm, PROMPTS) == expected


def test_a_real_model_is_identical_to_stock_under_budget(smollm: Path) -> None:
    prompts = [random_prompt(n) for n in (33, 300)]
    with engine(smollm, kv_cache_memory_bytes=256 << 20) as stock:
        expected = greedy(stock, prompts, 40)
    with engine(smollm, {"budget": 512}, kv_cache_memory_bytes=256 << 20) as llm:
        assert greedy(llm, prompts, 40) == expected


@pytest.mark.parametrize("policy", [None, {"name": "full"}])
def test_with_the_policy_off_backend_spec_and_manager_are_vllms_own(
    policy: dict[str, str] | None, llama: Path
) -> None:
    from vllm.v1.attention.backends.cpu_attn import (
        CPUAttentionBackend,
        CPUAttentionMetadataBuilder,
    )
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    # None: vLLM's own default.
    with engine(llama, policy, enable_prefix_caching=None) as llm:
        (group,) = runner_of(llm).attn_groups[0]
        assert group.backend is CPUAttentionBackend
        assert type(group.get_metadata_builder()) is CPUAttentionMetadataBuilder
        assert type(group.kv_cache_spec) is FullAttentionSpec
        (manager,) = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers
        assert type(manager) is FullAttentionManager
        assert scheduler_of(llm).kv_cache_manager.enable_caching


def test_engines_with_and_without_a_policy_do_not_see_each_other(llama: Path) -> None:
    prompts = [random_prompt(300)]
    with engine(llama) as stock:
        before = greedy(stock, prompts, 50)
    with engine(llama, {"budget": 128, "segment": 32}) as llm:
        assert greedy(llm, prompts, 50) != before
    with engine(llama) as stock:
        assert greedy(stock, prompts, 50) == before
