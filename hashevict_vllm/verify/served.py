"""A tiny random Llama, served by vLLM with and without a policy.

Below the budget tokens must be stock vLLM's, above it those of the reference. On a GPU
that is checked with the backend that vLLM chooses there, and with the one that serves
float32; with CUDA graphs and without.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hashevict_vllm.attention.xformers.support import CUSTOM, unsupported
from hashevict_vllm.config import KVPolicyConfig, kv_policy
from hashevict_vllm.verify.checks import UNCHECKED, Check, compared
from hashevict_vllm.verify.model import make_llama, random_prompt

MAX_MODEL_LEN = 1024
BUDGET = 128
POLICY: dict[str, Any] = {"name": "hashevict", "segment": 64, "recent": 48}
PROMPTS = [random_prompt(length, seed=3) for length in (257, 40, 513, 100)]
TOGETHER = (PROMPTS,)
FIRST_ALONE = (PROMPTS[:1], PROMPTS[1:])
"""With 256 tokens per step the first prompt then ends with a step of one token, for
which stock vLLM would replay a decode graph."""

LEAST_EQUAL = 0.9
"""Share of tokens that must be the reference's where attention rounds to TF32."""


Batches = tuple[list[list[int]], ...]


def generate(
    model: Path, budget: int | None, tokens: int, batches: Batches, **options: Any
) -> list[list[int]]:
    """Greedy continuations of batches of prompts by an engine of its own."""
    from vllm import LLM, SamplingParams

    from hashevict_vllm.eval.engine import shut_down

    if budget is not None:
        options["additional_config"] = kv_policy(**POLICY, budget=budget)
    llm = LLM(
        str(model),
        skip_tokenizer_init=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=len(PROMPTS),
        max_num_batched_tokens=256,
        block_size=32,
        kv_cache_memory_bytes=64 << 20,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
        **options,
    )
    params = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
    )
    texts = []
    try:
        for batch in batches:
            requests: Any = [{"prompt_token_ids": prompt} for prompt in batch]
            texts += llm.generate(requests, params, use_tqdm=False)
    finally:
        shut_down(llm)
    return [list(text.outputs[0].token_ids) for text in texts]


def reference_tokens(model: Path, tokens: int) -> list[list[int]]:
    """The same by transformers with the reference as its attention, on the CPU."""
    from hashevict_vllm.verify.oracle import Oracle

    config = KVPolicyConfig.from_dict({**POLICY, "budget": BUDGET})
    policy, oracle = config.resolve(MAX_MODEL_LEN, 32), Oracle(model)
    return [oracle.greedy(prompt, policy, tokens) for prompt in PROMPTS]


def equal_share(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of tokens before the first that differs, over all requests."""
    equal = 0
    for one, other in zip(ours, theirs, strict=True):
        pairs = list(zip(one, other, strict=True))
        differs = [index for index, (a, b) in enumerate(pairs) if a != b]
        equal += differs[0] if differs else len(pairs)
    return equal / sum(map(len, theirs))


def _compare(name: str, ours: Any, theirs: Any, least: float = 1.0) -> Check:
    share = equal_share(ours, theirs)
    count = sum(map(len, theirs))
    return compared("engine", name, share >= least, f"{share:.0%} of {count} tokens")


def run_on_cpu(tokens: int = 16) -> Iterator[Check]:
    """Numba's kernels in the served engine."""
    exact: dict[str, Any] = {"dtype": "float32", "enforce_eager": True}
    with tempfile.TemporaryDirectory() as folder:
        model = make_llama(Path(folder))
        stock = generate(model, None, tokens, TOGETHER, **exact)
        ample = generate(model, MAX_MODEL_LEN, tokens, TOGETHER, **exact)
        yield _compare("below the budget as stock vLLM (CPU)", ample, stock)
        bounded = generate(model, BUDGET, tokens, FIRST_ALONE, **exact)
        expected = reference_tokens(model, tokens)
        yield _compare("above the budget as the reference (CPU)", bounded, expected)


def run_on_gpu(tokens: int = 64) -> Iterator[Check]:
    """Triton's kernels in the served engine, with CUDA graphs and without."""
    modes: dict[str, dict[str, Any]] = {
        "eager": {"enforce_eager": True},
        # Decode graphs alone: piecewise ones would need minutes of torch.compile.
        "CUDA graphs": {
            "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        },
    }
    # Near enough to exact that greedy tokens can be compared.
    fine: dict[str, Any] = {"dtype": "float32", "attention_backend": "TRITON_ATTN"}
    with tempfile.TemporaryDirectory() as folder:
        model = make_llama(Path(folder), head_dim=64)
        bounded = {}
        for name, mode in modes.items():
            half = {"dtype": "bfloat16", **mode}
            stock = generate(model, None, tokens, TOGETHER, **half)
            ample = generate(model, MAX_MODEL_LEN, tokens, TOGETHER, **half)
            yield _compare(f"below the budget as stock vLLM ({name})", ample, stock)
            bounded[name] = generate(model, BUDGET, tokens, FIRST_ALONE, **fine, **mode)
        reason = unsupported(64, torch.float32, torch.cuda.get_device_capability())
        if reason is None:
            mode = {**modes["eager"], "attention_backend": CUSTOM}
            bounded["xformers"] = generate(
                model, BUDGET, tokens, FIRST_ALONE, **{**fine, **mode}
            )
        else:
            yield Check("engine", "xformers", UNCHECKED, reason)
        expected = reference_tokens(model, tokens)
    for name, ours in bounded.items():
        title = f"above the budget as the reference ({name})"
        yield _compare(title, ours, expected, LEAST_EQUAL)
