"""What ``serve`` asks of a server, and the model with a long context."""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

BLOCK_SIZE = 128
"""Tokens of a KV block: vLLM's default on CPUs."""


@dataclass(frozen=True)
class Scenario:
    """A load, equal for all servers that are compared.

    Attributes:
        model: ``default`` (SmolLM2-135M) or ``random`` (a Llama with long context).
        prompt: Tokens of every prompt.
        output: Tokens of every answer; none ends early.
        requests: Number of requests.
        in_flight: Requests at a time.
        pool_tokens: Tokens that stock vLLM's pool holds; ours has as many bytes.
        budget: ``--kv-budget`` of ours.
        turns: Of chats, the tokens that each turn adds; ``prompt`` is their sum.

    """

    model: str
    prompt: int
    output: int
    requests: int
    in_flight: int
    pool_tokens: int
    budget: int
    turns: tuple[int, ...] = ()

    @property
    def max_model_len(self) -> int:
        """Room for the chat template's and the tokenizer's own tokens, too."""
        replies = max(len(self.turns), 1) * self.output
        return whole_blocks(self.prompt + replies + 64)


def whole_blocks(tokens: int) -> int:
    """Tokens, rounded up to blocks."""
    return -(-tokens // BLOCK_SIZE) * BLOCK_SIZE


SCENARIOS = {
    # Nothing is evicted: what it costs to have the plugin on.
    "ample": Scenario("default", 256, 512, 32, 8, 32768, 1024),
    # Stock vLLM runs four of them at a time, and preempts.
    "tight": Scenario("default", 256, 1792, 24, 24, 4 * 2048, 256),
    # Answers of eight times the budget.
    "deep": Scenario("default", 256, 7680, 4, 4, 8192, 1024),
    # Reading prompts is most of the work, and their scratch most of the memory.
    "prompts": Scenario("default", 3072, 256, 24, 12, 4 * 4096, 512),
    # A long text, then questions about it: what prefix caching is for.
    "chat": Scenario("default", 3496, 64, 8, 2, 32768, 1024, (3000, 100, 396)),
    "long": Scenario("random", 256, 9216, 1, 1, 16384, 1024),
}
"""By name; see ``scripts/bench serve --help``."""

LONG_CONTEXT = 131072


def model_directory(name: str) -> Path:
    """Directory of a scenario's model, or the path that is given instead."""
    from hashevict_vllm.models import fetch_default_model

    if name == "default":
        return fetch_default_model()
    return _random_llama() if name == "random" else Path(name)


def _random_llama() -> Path:
    """A random Llama of 8 layers, 8 query and 2 KV heads, made once."""
    from hashevict_vllm.downloads import cache_dir
    from hashevict_vllm.models import fetch_default_model

    target = cache_dir() / "random-llama"
    if (target / "config.json").is_file():
        return target
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(fetch_default_model())
    config = LlamaConfig(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=1024,
        vocab_size=len(tokenizer),
        max_position_embeddings=LONG_CONTEXT,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    partial = target.with_name(".random-llama")
    shutil.rmtree(partial, ignore_errors=True)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(target)
    return target


@functools.cache
def kv_bytes_per_token(model: Path) -> int:
    """Bytes of K and V of one token in all layers, in bfloat16.

    Kept, as what transformers imports here must not be imported by two threads at once.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    heads = config.num_key_value_heads
    return int(config.num_hidden_layers * 2 * heads * head_dim * 2)


def own_pool(model: Path, tokens: float) -> int:
    """Bytes of a pool for so many tokens, for ``kv_cache_memory_bytes``.

    ``VLLM_CPU_KVCACHE_SPACE``, which beats that (vllm/platforms/cpu.py), is dropped.
    """
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    return int(tokens * kv_bytes_per_token(model))
