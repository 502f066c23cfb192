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

from support.engine import engine, greedy, runner_of  # noqa: E402
from support.models import make_llama, random_prompt  # noqa: E402
from support.oracle import Oracle, resolve  # noqa: E402
from vllm.v1.worker.gpu.model_runner import (  # noqa: E402
    GPUModelRunner as GPUModelRunnerV2,
)

from hashevict_vllm.attention.gpu_metadata import (  # noqa: E402
    DeviceMetadataBuilderMixin,
)
from hashevict_vllm.vllm_patches import apply_all  # noqa: E402

apply_all()

SIZES = {"max_num_seqs": 2, "max_num_batched_tokens": 64, "max_model_len": 128}
# Alone, the first prompt ends with a chunk of one token; the last never fills a budget.
BATCHES = [[65], [70, 20]]
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


@pytest.mark.parametrize(("runner", "rule"), [("1", "vote"), ("0", "instant")])
def test_tokens_equal_the_oracle_with_both_model_runners(
    runner: str, rule: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    policy = {"budget": 48, "recent": 8, **RULES[rule]}
    prompts = [[random_prompt(n, seed=3) for n in batch] for batch in BATCHES]
    with as_on_a_gpu(), engine(llama, policy, block_size=16, **SIZES) as llm:
        assert isinstance(runner_of(llm), GPUModelRunnerV2) == (runner == "1")
        ((group,),) = runner_of(llm).attn_groups
        assert isinstance(group.metadata_builders[0], DeviceMetadataBuilderMixin)
        tokens = [greedy(llm, batch, TOKENS) for batch in prompts]
    oracle, resolved = Oracle(llama), resolve(policy, 16)
    assert tokens == [
        [oracle.greedy(prompt, resolved, TOKENS) for prompt in batch]
        for batch in prompts
    ]
