"""LoRA adapters beside a budget: each request has its own keys, and its own victims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.engine import engine
from support.models import random_prompt

RANK = 4
LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
TOKENS = 40


def make_adapter(path: Path, llama: Path, seed: int) -> Path:
    """A random adapter of q, k and v, large enough to matter."""
    import json

    config = json.loads((llama / "config.json").read_text())
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    outputs = {
        "q_proj": config["num_attention_heads"] * head_dim,
        "k_proj": config["num_key_value_heads"] * head_dim,
        "v_proj": config["num_key_value_heads"] * head_dim,
    }
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, width in outputs.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("A", (RANK, hidden)), ("B", (width, RANK))):
                weight = torch.randn(shape, generator=generator) * 0.2
                weights[f"{prefix}.lora_{part}.weight"] = weight
    path.mkdir()
    save_file(weights, path / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    adapter["target_modules"] = sorted(outputs)
    (path / "adapter_config.json").write_text(json.dumps(adapter))
    return path


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two adapters.

    Not beside a request without one: on CPUs vLLM 0.32 gives that one the weights
    of the last adapter (vllm/lora/ops/torch_ops/lora_ops.py indexes with -1).
    """
    from vllm.lora.request import LoRARequest

    root = tmp_path_factory.mktemp("adapters")
    return [
        LoRARequest(f"a{i}", i, str(make_adapter(root / f"a{i}", llama, i)))
        for i in (1, 2)
    ]


def answers(llm: Any, prompts: list[list[int]], adapters: list[Any]) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        params,
        use_tqdm=False,
        lora_request=adapters,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_below_the_budget_adapters_answer_as_in_stock_vllm(
    llama: Path, adapters: list[Any]
) -> None:
    prompts = [random_prompt(90)] * 2
    with engine(llama, max_num_seqs=2, **LORA) as llm:
        stock = answers(llm, prompts, adapters)
    assert len({tuple(answer) for answer in stock}) == 2, "adapters change nothing"
    with engine(llama, {"budget": 160, "segment": 64}, max_num_seqs=2, **LORA) as llm:
        assert answers(llm, prompts, adapters) == stock


def test_an_adapters_answer_does_not_depend_on_the_others_in_the_batch(
    llama: Path, adapters: list[Any]
) -> None:
    policy = {"budget": 160, "segment": 64}
    prompts = [random_prompt(400)] * 2
    with engine(llama, policy, max_num_seqs=2, **LORA) as llm:
        mixed = answers(llm, prompts, adapters)
        alone = [
            answers(llm, [prompt], [adapter])[0]
            for prompt, adapter in zip(prompts, adapters, strict=True)
        ]
    assert mixed == alone
    assert mixed[0] != mixed[1], "adapters change nothing"
