"""The whole engine on the GPU's code path, interpreted: both model runners."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hashevict_vllm.verify.interpreter import allow_triton, as_on_a_gpu

allow_triton()

from support import xformers_reference  # noqa: E402
from support.engine import engine, greedy, runner_of, scheduler_of  # noqa: E402
from support.models import make_llama, random_prompt  # noqa: E402
from support.oracle import Oracle, resolve  # noqa: E402
from vllm.v1.worker.gpu.model_runner import (  # noqa: E402
    GPUModelRunner as GPUModelRunnerV2,
)

from hashevict_vllm import plugin  # noqa: E402
from hashevict_vllm.attention.gpu.metadata import (  # noqa: E402
    DeviceMetadataBuilderMixin,
)
from hashevict_vllm.request_budget import policy_with  # noqa: E402
from hashevict_vllm.resolved import UNBOUNDED  # noqa: E402

plugin.register()

SIZES = {"max_num_seqs": 2, "max_num_batched_tokens": 64, "max_model_len": 128}
# Alone, the first prompt ends with a chunk of one token.
BATCHES = [[65], [70, 60]]
BUDGETS: list[list[Any]] = [[None], [40, "full"]]
TOKENS = 3
RULES: dict[str, dict[str, Any]] = {
    "instant": {"scoring": "instant", "segment": 32, "hash_bits": 16},
    "vote": {"scoring": "vote", "segment": 32, "hash_bits": 16, "window": 4},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "model"
    one = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_llama(path, **one)


@pytest.mark.parametrize(
    ("backend", "runner", "rule"),
    [
        ("TRITON_ATTN", "1", "vote"),
        ("TRITON_ATTN", "0", "instant"),
        # xformers, whose operators alone are replaced
        ("CUSTOM", "1", "instant"),
        ("CUSTOM", "0", "vote"),
    ],
)
def test_tokens_equal_the_oracle_with_both_model_runners(
    backend: str, runner: str, rule: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    monkeypatch.setattr(xformers_reference.SEAM, xformers_reference.attention)
    policy = {"budget": 48, "allow_full": True, **RULES[rule]}
    prompts = [[random_prompt(n, seed=3) for n in batch] for batch in BATCHES]
    with (
        as_on_a_gpu(backend),
        engine(llama, policy, block_size=16, attention_backend=backend, **SIZES) as llm,
    ):
        assert isinstance(runner_of(llm), GPUModelRunnerV2) == (runner == "1")
        ((group,),) = runner_of(llm).attn_groups
        assert group.backend.get_name() == backend
        assert isinstance(group.metadata_builders[0], DeviceMetadataBuilderMixin)
        batches = list(zip(prompts, BUDGETS, strict=True))
        tokens = [greedy(llm, batch, TOKENS, budgets) for batch, budgets in batches]
        # Ballots of the last layer were joined when the model had ended.
        assert group.metadata_builders[0].constants.fork.ends_with_model
    oracle, resolved = Oracle(llama), resolve(policy, 16)
    of_request = {
        None: resolved,
        40: resolve({**policy, "budget": 40}, 16),
        "full": policy_with(resolved, UNBOUNDED),
    }
    assert tokens == [
        [
            oracle.greedy(prompt, of_request[budget], TOKENS)
            for prompt, budget in zip(batch, budgets, strict=True)
        ]
        for batch, budgets in batches
    ]


@pytest.mark.parametrize("runner", ["1", "0"])
def test_prefix_caching_changes_no_token_with_both_model_runners(
    runner: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    policy = {"budget": 48, "recent": 8, **RULES["vote"]}
    text = random_prompt(90, seed=3)
    prompts = [text[:70], text, text[:50] + random_prompt(10, seed=4)]
    options = {"block_size": 16, "attention_backend": "TRITON_ATTN", **SIZES}
    hits = []
    with (
        as_on_a_gpu("TRITON_ATTN"),
        engine(llama, policy, enable_prefix_caching=True, **options) as llm,
    ):
        assert isinstance(runner_of(llm), GPUModelRunnerV2) == (runner == "1")
        manager = scheduler_of(llm).kv_cache_manager
        stock = manager.get_computed_blocks

        def look_up(request: Any) -> Any:
            found = stock(request)
            hits.append(found[1])
            return found

        manager.get_computed_blocks = look_up
        tokens = [greedy(llm, [prompt], TOKENS)[0] for prompt in prompts]
    # The state after two segments, then raw blocks up to the first voter.
    assert hits == [0, 64, 48]
    oracle, resolved = Oracle(llama), resolve(policy, 16)
    assert tokens == [oracle.greedy(prompt, resolved, TOKENS) for prompt in prompts]
