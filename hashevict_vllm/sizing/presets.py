"""Shapes of well-known models, for plans without their files.

Values are those of the models' published ``config.json``; nothing here is needed to
serve a model.
"""

from __future__ import annotations

from typing import Any

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
_GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}


def _shape(
    family: dict[str, Any],
    *,
    hidden: int,
    inner: int,
    layers: int,
    heads: tuple[int, int],
    head_dim: int,
    vocabulary: int,
    longest: int,
    tied: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """A ``config.json`` of ``heads`` = (query heads, KV heads)."""
    return {
        **family,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": longest,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        **more,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _shape(
        _LLAMA,
        hidden=4096,
        inner=14336,
        layers=32,
        heads=(32, 8),
        head_dim=128,
        vocabulary=128256,
        longest=131072,
    ),
    "llama-3.1-70b": _shape(
        _LLAMA,
        hidden=8192,
        inner=28672,
        layers=80,
        heads=(64, 8),
        head_dim=128,
        vocabulary=128256,
        longest=131072,
    ),
    "qwen2.5-7b": _shape(
        _QWEN2,
        hidden=3584,
        inner=18944,
        layers=28,
        heads=(28, 4),
        head_dim=128,
        vocabulary=152064,
        longest=32768,
    ),
    "qwen3-8b": _shape(
        _QWEN3,
        hidden=4096,
        inner=12288,
        layers=36,
        heads=(32, 8),
        head_dim=128,
        vocabulary=151936,
        longest=40960,
    ),
    "qwen3-32b": _shape(
        _QWEN3,
        hidden=5120,
        inner=25600,
        layers=64,
        heads=(64, 8),
        head_dim=128,
        vocabulary=151936,
        longest=40960,
    ),
    "gemma-3-1b": _shape(
        _GEMMA3,
        hidden=1152,
        inner=6912,
        layers=26,
        heads=(4, 1),
        head_dim=256,
        vocabulary=262144,
        longest=32768,
        tied=True,
        sliding_window=512,
        sliding_window_pattern=6,
    ),
}
"""``config.json`` by name."""
