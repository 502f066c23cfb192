"""A small random model on disk: enough to serve, nothing to fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB = 512


def make_llama(path: Path, **overrides: Any) -> Path:
    """Write a random Llama; weights large enough that every cached token matters.

    Args:
        path: Directory to write.
        overrides: Fields of ``LlamaConfig``.

    """
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCAB,
        "intermediate_size": 256,
        "max_position_embeddings": 65536,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**options, **overrides})).save_pretrained(path)
    return path


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids of the random models' vocabulary."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()
