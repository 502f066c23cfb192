"""What the xformers backend relies on: a backend of ours among vLLM's."""

from __future__ import annotations

from .checks import Fact
from .facts import BACKEND, LAYER

REGISTRY = "vllm/v1/attention/backends/registry.py"
DEFAULTS = (
    *("supports_sink", "supports_sliding_window", "supports_non_causal"),
    *("supports_mm_prefix", "supports_rswa", "supports_batch_invariance"),
    *("is_mla", "is_sparse"),
)
"""Hooks by which the base class declines what xformers cannot do."""

XFORMERS_FACTS = (
    Fact(
        f"{REGISTRY}:AttentionBackendEnum",
        "attention/xformers/support.py puts a backend in the place of CUSTOM",
        says=("CUSTOM = None",),
        has=("get_path", "get_class", "is_overridden"),
    ),
    Fact(
        f"{REGISTRY}:register_backend",
        "attention/xformers/support.py calls it",
        takes=("backend", "class_path", "is_mamba"),
    ),
    Fact(
        f"{LAYER}:Attention.__init__",
        "a backend's name must be one of the registry",
        says=("AttentionBackendEnum[self.attn_backend.get_name()]",),
    ),
    Fact(
        "vllm/platforms/cuda.py:CudaPlatformBase.get_attn_backend_cls",
        "the backend that --attention-backend names is asked whether it will do",
        says=("backend_class.validate_configuration(",),
    ),
    Fact(
        "vllm/config/attention.py:AttentionConfig",
        "compat/device.py reads which backend full-attention layers get",
        has=("backend", "backend_per_kind"),
    ),
    Fact(
        f"{BACKEND}:AttentionBackend.supports_combination",
        "attention/xformers/backend.py says there which GPUs xformers serves",
        takes=(
            *("cls", "head_size", "dtype", "kv_cache_dtype", "block_size", "use_mla"),
            *("has_sink", "use_sparse", "use_mm_prefix", "device_capability"),
        ),
    ),
    Fact(
        f"{BACKEND}:AttentionBackend.validate_configuration",
        "reasons of attention/xformers/backend.py refuse a start",
        says=(
            "cls.supports_device_cpu_query_lens_mismatch()",
            "combination_reason = cls.supports_combination(",
            "invalid_reasons.append(combination_reason)",
        ),
    ),
    Fact(
        f"{BACKEND}:AttentionBackend",
        "quantised caches are declined by default",
        says=("= ['auto', 'float16', 'bfloat16']",),
        has=("supported_kv_cache_dtypes", "supported_dtypes"),
    ),
    *(
        Fact(
            f"{BACKEND}:AttentionBackend.{name}",
            "attention/xformers/backend.py declines it by the default",
            takes=("cls",),
            says=("return False",),
        )
        for name in DEFAULTS
    ),
    Fact(
        f"{BACKEND}:AttentionBackend.supports_attn_type",
        "attention/xformers/backend.py serves decoders only, by the default",
        says=("return attn_type == AttentionType.DECODER",),
    ),
    Fact(
        f"{BACKEND}:AttentionMetadataBuilder.get_cudagraph_support",
        "attention/xformers/metadata.py stays out of graphs",
        says=("return cls._cudagraph_support",),
    ),
    Fact(
        f"{BACKEND}:CommonAttentionMetadata",
        "attention/xformers/metadata.py makes biases from the host's lengths",
        has=("seq_lens_cpu_upper_bound", "query_start_loc_cpu"),
    ),
    Fact(
        f"{BACKEND}:AttentionImpl.__init__",
        "attention/xformers/impl.py takes what layers pass",
        takes=(
            *("self", "num_heads", "head_size", "scale", "num_kv_heads"),
            *("alibi_slopes", "sliding_window", "kv_cache_dtype", "logits_soft_cap"),
            *("attn_type", "kv_sharing_target_layer_name"),
        ),
    ),
    *(
        Fact(
            f"vllm/v1/attention/backends/{file}.py:{name}Impl.forward",
            "while vLLM profiles memory, the wrapper leaves it to this",
            says=("if attn_metadata is None:\n        return output.fill_(0)",),
        )
        for file, name in (
            ("flash_attn", "FlashAttention"),
            ("triton_attn", "TritonAttention"),
            ("flashinfer", "FlashInfer"),
        )
    ),
)
"""Of vLLM; what is relied on in xformers, tests ask xformers itself."""
