"""What the plugin relies on wherever it runs, by the directory that relies on it."""

from __future__ import annotations

from .checks import Fact
from .engine_facts import ENGINE_FACTS
from .prefix_facts import PREFIX_FACTS

BACKEND = "vllm/v1/attention/backend.py"
CPU_BACKEND = "vllm/v1/attention/backends/cpu_attn.py"
LAYER = "vllm/model_executor/layers/attention/attention.py"
MANAGER = "vllm/v1/core/single_type_kv_cache_manager.py:SingleTypeKVCacheManager"
SPECS = "vllm/v1/kv_cache_interface.py"
ARGS = "vllm/engine/arg_utils.py"
SCHEDULER = "vllm/v1/core/sched/scheduler.py:Scheduler"
RUNNER_V1 = "vllm/v1/worker/gpu_model_runner.py:GPUModelRunner"

BUILDER_INIT = ("self", "kv_cache_spec", "layer_names", "vllm_config", "device")
BUILDER_BUILD = ("self", "common_prefix_len", "common_attn_metadata", "fast_build")
UPDATE = ("self", "layer", "key", "value", "kv_cache", "slot_mapping")
FORWARD = (
    *("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata"),
    *("output", "output_scale", "output_block_scale"),
)

ATTENTION = (
    Fact(
        f"{BACKEND}:AttentionBackend",
        "attention/backend.py derives the wrapped backend from it",
        has=(
            *("forward_includes_kv_cache_update", "customize_spec", "get_name"),
            *("get_impl_cls", "get_builder_cls", "supports_kv_connector"),
        ),
    ),
    Fact(
        f"{BACKEND}:AttentionBackend.customize_spec",
        "attention/backend.py overrides it to return a budgeted spec",
        takes=("cls", "spec"),
    ),
    Fact(
        "vllm/v1/worker/utils.py:customize_attention_spec",
        "a layer's spec is budgeted by its backend's customize_spec",
        says=("backend.customize_spec(spec)",),
    ),
    Fact(
        f"{BACKEND}:AttentionMetadataBuilder",
        "attention/cpu/metadata.py switches it off",
        has=("supports_update_block_table",),
    ),
    Fact(
        f"{BACKEND}:CommonAttentionMetadata",
        "attention/cpu/metadata.py reads and replaces them",
        has=(
            *("query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs"),
            *("num_actual_tokens", "max_query_len", "max_seq_len", "replace"),
            *("block_table_tensor", "slot_mapping"),
            *("rswa_prefix_lens", "is_prefilling"),
        ),
    ),
    Fact(
        f"{CPU_BACKEND}:CPUAttentionMetadataBuilder.__init__",
        "attention/cpu/metadata.py passes these on",
        takes=BUILDER_INIT,
    ),
    Fact(
        f"{CPU_BACKEND}:CPUAttentionMetadataBuilder.build",
        "attention/cpu/metadata.py calls it once per round",
        takes=BUILDER_BUILD,
    ),
    Fact(
        f"{CPU_BACKEND}:CPUAttentionBackendImpl",
        "attention/cpu/forward.py and attention/cpu/constants.py read them",
        has=("scale", "kv_sharing_target_layer_name"),
    ),
    Fact(
        f"{CPU_BACKEND}:CPUAttentionBackendImpl.forward",
        "attention/cpu/forward.py calls it over the live slots",
        takes=FORWARD,
    ),
    Fact(
        f"{CPU_BACKEND}:CPUAttentionBackendImpl.do_kv_cache_update",
        "cache/element_map.py learns the order of a page from it",
        takes=UPDATE,
    ),
    Fact(
        f"{LAYER}:Attention.__init__",
        "vllm_patches/attention_layer.py wraps what this call returns",
        says=(
            *("self.attn_backend = get_attn_backend(", "use_mla=False"),
            *("attn_type=attn_type", "has_sliding_window=sliding_window is not None"),
            *("impl_cls = self.attn_backend.get_impl_cls()", "self.impl = impl_cls("),
        ),
    ),
    Fact(
        f"{LAYER}:Attention.forward",
        "a budgeted layer writes its cache inside forward",
        says=("not self.attn_backend.forward_includes_kv_cache_update",),
    ),
    Fact(
        f"{LAYER}:unified_attention_with_output",
        "attention/cpu/forward.py gets the whole step's q, k and v in one call",
        says=(
            "self.impl.forward(self, query, key, value, kv_cache, attn_metadata, "
            "output=output",
        ),
    ),
    Fact(
        "vllm/config/compilation.py:CompilationConfig",
        "attention/cpu/metadata.py finds a layer of its group there",
        has=("static_forward_context",),
    ),
)

CACHE = (
    Fact(
        MANAGER,
        "cache/manager.py uses them",
        has=(
            *("req_to_blocks", "block_pool", "block_size"),
            *("_record_new_block_ids", "new_block_ids"),
            "has_positionally_stable_blocks",
        ),
    ),
    Fact(
        f"{MANAGER}.remove_skipped_blocks",
        "cache/manager.py overrides it to return a prompt's scratch",
        takes=(
            *("self", "request_id", "processed_computed_tokens"),
            "num_prompt_tokens",
        ),
    ),
    Fact(
        f"{MANAGER}.get_num_blocks_to_allocate",
        "cache/manager.py overrides it",
        takes=(
            *("self", "request_id", "num_tokens", "new_computed_blocks"),
            *("total_computed_tokens", "num_local_computed_tokens"),
            *("num_tokens_main_model", "apply_admission_cap", "prefill_end"),
        ),
    ),
    Fact(
        f"{MANAGER}.allocate_new_blocks",
        "cache/manager.py overrides it",
        takes=("self", "request_id", "num_tokens", "num_tokens_main_model"),
    ),
    Fact(
        f"{MANAGER}.pop_blocks_for_free",
        "cache/manager.py overrides it to forget a request",
        takes=("self", "request_id"),
    ),
    Fact(
        f"{MANAGER}.find_longest_cache_hit",
        "cache/manager.py and cache/prefix.py override it",
        takes=(
            *("cls", "block_hashes", "max_length", "kv_cache_group_ids"),
            *("block_pool", "kv_cache_spec", "drop_eagle_block"),
            *("alignment_tokens", "dcp_world_size", "pcp_world_size"),
        ),
    ),
    Fact(
        "vllm/v1/core/kv_cache_manager.py:KVCacheManager.allocate_slots",
        "cache/manager.py returns scratch before it counts what is missing",
        says=(
            *("full_sequence_must_fit", "remove_skipped_blocks("),
            *("num_prompt_tokens=", "self.coordinator.allocate_new_blocks("),
        ),
    ),
    Fact(
        "vllm/v1/core/block_pool.py:BlockPool.get_new_blocks",
        "cache/manager.py takes blocks with it",
        takes=("self", "num_blocks"),
    ),
    Fact(
        "vllm/v1/core/block_pool.py:BlockPool.free_blocks",
        "cache/manager.py gives blocks back with it",
        takes=("self", "ordered_blocks"),
    ),
    Fact(
        "vllm/v1/core/block_pool.py:BlockPool.__init__",
        "cache/capacity.py counts one block less than the pool has",
        says=("self.null_block = self.free_block_queue.popleft()",),
    ),
    Fact(
        f"{RUNNER_V1}._update_states",
        "worker rows of running requests are append-only (cache/prefix.py)",
        says=("block_ids.extend(new_ids)",),
    ),
    Fact(
        f"{SPECS}:KVCacheSpec",
        "cache/spec.py overrides or reads them",
        has=(
            *("block_size", "prefix_cacheable", "page_size_bytes"),
            "max_memory_usage_bytes",
        ),
    ),
    Fact(
        f"{SPECS}:AttentionSpec",
        "cache/spec.py builds a budgeted spec from them",
        has=(
            *("num_kv_heads", "head_size", "head_size_v", "dtype"),
            *("page_size_padded", "unpadded_page_size_bytes"),
        ),
    ),
    Fact(
        f"{SPECS}:FullAttentionSpec",
        "cache/spec.py refuses a spec that has them",
        has=("sliding_window", "attention_chunk_size"),
    ),
    Fact(
        f"{SPECS}:compute_layout_strides",
        "signatures live in a page's padding, a tail that strides account for",
        says=(
            "page_size_padded",
            "current_stride = max(current_stride, padded_page_size)",
        ),
    ),
    Fact(
        f"{SPECS}:KVCacheConfig",
        "cache/capacity.py reads them",
        has=("num_blocks", "kv_cache_groups"),
    ),
    Fact(
        f"{SPECS}:KVCacheGroupSpec",
        "cache/capacity.py reads them",
        has=("layer_names", "kv_cache_spec"),
    ),
    Fact(
        f"{SPECS}:UniformTypeKVCacheSpecs",
        "cache/capacity.py reads it",
        has=("kv_cache_specs",),
    ),
    Fact(
        "vllm/v1/kv_cache_spec_registry.py:KVCacheSpecRegistry.register",
        "cache/spec.py registers the budgeted spec",
        takes=("cls", "kvcache_spec_cls", "manager_class", "uniform_type_base_spec"),
    ),
    Fact(
        "vllm/v1/kv_cache_spec_registry.py:KVCacheSpecRegistry._ensure_registered",
        "cache/spec.py registers the stock specs first, as a filled registry stays so",
        says=("if _REGISTRY_KVCACHESPEC_LIST:\n        return",),
    ),
)

PATCHES = (
    Fact(
        f"{ARGS}:EngineArgs.add_cli_args",
        "vllm_patches/engine_args.py adds the --kv-policy options",
        takes=("parser",),
    ),
    Fact(
        f"{ARGS}:EngineArgs.from_cli_args",
        "vllm_patches/engine_args.py reads the options",
        takes=("cls", "args"),
    ),
    Fact(
        f"{ARGS}:EngineArgs.create_engine_config",
        "vllm_patches/engine_args.py checks the configuration that it returns",
        takes=("self", "usage_context", "headless"),
    ),
    Fact(
        f"{ARGS}:EngineArgs",
        "cli.py and compat/rules.py set them",
        has=("additional_config", "enable_prefix_caching"),
    ),
    Fact(
        f"{ARGS}:AsyncEngineArgs.add_cli_args",
        "the plugin must be loaded before vLLM adds its options",
        says=("load_general_plugins()", "EngineArgs.add_cli_args(parser)"),
    ),
    Fact(
        f"{ARGS}:EngineArgs.__post_init__",
        "the plugin must be loaded by engine arguments made in Python",
        says=("load_general_plugins()",),
    ),
    Fact(
        f"{ARGS}:EngineArgs._set_default_chunked_prefill_and_prefix_caching_args",
        "compat/rules.py decides on prefix caching while it is None",
        says=("self.enable_prefix_caching is None",),
    ),
    Fact(
        f"{SPECS}:KVCacheConfig.needs_kv_cache_zeroing",
        "vllm_patches/block_zeroing.py wraps the property",
        says=("self.has_mamba_layers or self.has_mixed_precision_kv_cache",),
    ),
    Fact(
        "vllm/v1/core/sched/scheduler.py:Scheduler",
        "vllm_patches/block_zeroing.py has new blocks of hybrid models zeroed",
        says=(
            "self.needs_kv_cache_zeroing = kv_cache_config.needs_kv_cache_zeroing",
            "new_block_ids_to_zero=self._get_new_block_ids_to_zero()",
        ),
    ),
    Fact(
        f"{RUNNER_V1}._update_states",
        "vllm_patches/block_zeroing.py has new blocks zeroed before they are used",
        says=("self._zero_block_ids(scheduler_output.new_block_ids_to_zero)",),
    ),
    Fact(
        "vllm/v1/worker/cpu_model_runner.py:CPUModelRunner._zero_block_ids",
        "vllm_patches/block_zeroing.py replaces it, as it zeroes stock layers alone",
        takes=("self", "block_ids"),
        says=("isinstance(group.kv_cache_spec, FullAttentionSpec)",),
    ),
    Fact(
        "vllm/v1/worker/utils.py:KVBlockZeroer",
        "vllm_patches/block_zeroing.py relies on it on GPUs",
        says=("isinstance(spec, AttentionSpec)",),
    ),
    Fact(
        f"{RUNNER_V1}._build_attention_metadata",
        "vllm_patches/model_runner.py passes the prompt lengths of other models",
        says=(
            "self.input_batch.num_prompt_tokens_cpu_tensor",
            "if self.model_config.rswa_window is not None:\n"
            "        rswa_prefix_lens = num_prompt_tokens_cpu",
            "rswa_prefix_lens=rswa_prefix_lens",
        ),
    ),
    Fact(
        "vllm/triton_utils/dispatcher.py:_rebind_kernels",
        "vllm_patches/kernel_dispatcher.py shadows vars for this line",
        says=("vars(value).get('kernel')",),
    ),
)

CONFIG = (
    Fact(
        "vllm/config/vllm.py:VllmConfig",
        "compat/rules.py reads them",
        has=(
            *("model_config", "cache_config", "parallel_config", "scheduler_config"),
            *("compilation_config", "lora_config", "speculative_config"),
            *("kv_transfer_config", "kv_events_config", "diffusion_config"),
            "additional_config",
        ),
    ),
    Fact(
        "vllm/config/vllm.py:VllmConfig.compute_hash",
        "compiled graphs of different policies must not be mixed up",
        says=("json.dumps(additional_config, sort_keys=True)",),
    ),
    Fact(
        "vllm/config/model.py:ModelConfig",
        "compat/rules.py reads them",
        has=(
            *("runner_type", "is_encoder_decoder", "is_diffusion", "use_mla"),
            *("is_attention_free", "is_hybrid", "rswa_window", "is_mm_prefix_lm"),
            *("uses_alibi", "attention_chunk_size", "get_sliding_window"),
            *("max_model_len", "dtype", "architecture", "hf_text_config"),
        ),
    ),
    Fact(
        "vllm/config/cache.py:CacheConfig",
        "compat/rules.py reads them",
        has=(
            *("block_size", "cache_dtype", "enable_prefix_caching", "sliding_window"),
            *("kv_sharing_fast_prefill", "kv_offloading_size"),
            "user_specified_block_size",
        ),
    ),
    Fact(
        "vllm/platforms/cpu.py:CpuPlatform.check_and_update_config",
        "host.block_size_of foresees this default",
        says=("not cache_config.user_specified_block_size", "block_size = 128"),
        only="0.32",
    ),
    Fact(
        "vllm/platforms/cpu.py:CpuPlatform.update_block_size_for_backend",
        "host.block_size_of foresees this default",
        says=(
            "not cache_config.user_specified_block_size",
            "cls._preferred_block_size_for_backends(backend_classes, 128, vllm_config)",
        ),
        only="0.33",
    ),
    Fact(
        "vllm/config/parallel.py:ParallelConfig",
        "compat/rules.py reads them",
        has=("decode_context_parallel_size", "prefill_context_parallel_size"),
    ),
    Fact(
        "vllm/config/scheduler.py:SchedulerConfig",
        "compat/rules.py reads it",
        has=("disable_hybrid_kv_cache_manager",),
    ),
    Fact(
        "vllm/config/kv_transfer.py:KVTransferConfig",
        "compat/rules.py reads it",
        has=("kv_connector",),
    ),
    Fact(
        "vllm/config/kv_events.py:KVEventsConfig",
        "compat/rules.py reads it",
        has=("enable_kv_cache_events",),
    ),
    Fact(
        "vllm/platforms/interface.py:Platform",
        "compat/rules.py reads them",
        has=("is_cpu", "device_type"),
    ),
)

EVAL = (
    Fact(
        "vllm/v1/sample/logits_processor/__init__.py:AdapterLogitsProcessor"
        ".new_req_logits_processor",
        "eval/forcing.py overrides it",
        takes=("self", "params"),
    ),
    Fact(
        "vllm/v1/sample/logits_processor/interface.py:LogitsProcessor",
        "eval/forcing.py overrides them",
        has=("validate_params", "is_argmax_invariant"),
    ),
    Fact(
        "vllm/config/model.py:ModelConfig",
        "eval/forcing.py sets them",
        has=("logits_processors", "logprobs_mode"),
    ),
    Fact(
        "vllm/v1/sample/sampler.py:Sampler.forward",
        "eval/forcing.py reads logprobs from before any processor runs",
        says=("logprobs_mode == 'raw_logprobs'", "self.apply_logits_processors("),
    ),
    Fact(
        "vllm/sampling_params.py:SamplingParams",
        "eval/forcing.py sets them",
        has=(
            *("temperature", "max_tokens", "logprobs", "ignore_eos", "stop"),
            *("detokenize", "extra_args"),
        ),
    ),
)

FACTS = (
    *ATTENTION,
    *CACHE,
    *PREFIX_FACTS,
    *PATCHES,
    *ENGINE_FACTS,
    *CONFIG,
    *EVAL,
)
"""What CPU and GPU have in common, and what is the CPU's alone."""
