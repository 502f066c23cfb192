"""Small random models on disk, made by transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from hashevict_vllm.verify.model import VOCAB, make_llama, random_prompt

__all__ = [
    "VOCAB",
    "add_byte_tokenizer",
    "make_gemma3",
    "make_gemma4",
    "make_llama",
    "random_prompt",
]


def make_gemma3(path: Path) -> Path:
    """A random Gemma-3-shaped model: sliding-window and full layers, 2 to 1."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCAB,
        intermediate_size=256,
        sliding_window=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        max_position_embeddings=8192,
        initializer_range=0.3,
        query_pre_attn_scalar=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(path)
    return path


def make_gemma4(path: Path, sliding: tuple[int, int], full: tuple[int, int]) -> Path:
    """A random Gemma-4-shaped model, whose layers differ in what they keep of a token.

    Args:
        path: Where it is saved.
        sliding: KV heads and head_dim of the sliding-window layers.
        full: The same of the full ones.

    """
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=sliding[0],
        head_dim=sliding[1],
        num_global_key_value_heads=full[0],
        global_head_dim=full[1],
        attention_k_eq_v=True,  # lets the full layers have heads of their own
        vocab_size=VOCAB,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=0,
        intermediate_size=256,
        sliding_window=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        max_position_embeddings=8192,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    Gemma4ForCausalLM(config).save_pretrained(path)
    return path


def add_byte_tokenizer(path: Path) -> Path:
    """Give a model a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    assert len(vocabulary) <= VOCAB
    return path
