"""What the patches rely on where an engine starts and takes requests."""

from __future__ import annotations

from .checks import Fact

CORE = "vllm/v1/engine/core.py:EngineCore"
RUNNER_V1 = "vllm/v1/worker/gpu_model_runner.py:GPUModelRunner"

ENGINE_FACTS = (
    Fact(
        f"{CORE}._initialize_kv_caches",
        "vllm_patches/engine_core.py replaces get_kv_cache_configs in its module, and "
        "cache/late.py changes its result before workers and scheduler get it",
        says=(
            "= get_kv_cache_configs(vllm_config, kv_cache_specs, available_gpu_memory",
            "generate_scheduler_kv_cache_config(kv_cache_configs)",
        ),
    ),
    Fact(
        "vllm/v1/worker/gpu_worker.py:Worker.get_kv_cache_spec",
        "vllm_patches/engine_core.py looks at its result",
        takes=("self",),
        says=("self.model_runner.get_kv_cache_spec()",),
    ),
    Fact(
        "vllm/v1/worker/gpu_worker.py:Worker.get_model",
        "vllm_patches/engine_core.py joins ballots when the model's forward ends",
        takes=("self",),
        says=("self.model_runner.get_model()",),
    ),
    Fact(
        "vllm/compilation/cuda_graph.py:CUDAGraphWrapper.__call__",
        "attention/gpu/fork.py: the model is captured with its forward hooks",
        says=("output = self.runnable(*args, **kwargs)",),
    ),
    Fact(
        "vllm/v1/worker/gpu/cudagraph_utils.py:CudaGraphManager.capture",
        "attention/gpu/fork.py: the model runs once before it is captured",
        says=(
            "forward_fn(CUDAGraphMode.NONE)",
            "torch.cuda.graph(",
            "forward_fn(CUDAGraphMode.NONE)",
        ),
    ),
    Fact(
        "vllm/config/model.py:ModelConfig",
        "cache/late.py knows --max-model-len auto by it",
        says=("self.original_max_model_len = self.max_model_len",),
    ),
    Fact(
        "vllm/plugins/__init__.py:load_plugins_by_group",
        "config.py refuses an environment in which the plugin is not loaded",
        says=("envs.VLLM_PLUGINS", "plugin.name in allowed_plugins"),
    ),
    Fact(
        "vllm/v1/engine/async_llm.py:AsyncLLM.add_request",
        "vllm_patches/streaming_input.py refuses sessions before anything is stored",
        says=("isinstance(prompt, AsyncGenerator)", "_add_streaming_input_request("),
    ),
    Fact(
        "vllm/v1/engine/async_llm.py:AsyncLLM.generate",
        "vllm_patches/usage.py wraps it, and passes the rest on",
        says=("self.add_request(", "yield out"),
    ),
    Fact(
        "vllm/entrypoints/serve/engine/protocol.py:UsageInfo",
        "vllm_patches/usage.py adds a field to those it has",
        has=("prompt_tokens", "completion_tokens"),
    ),
    Fact(
        "vllm/entrypoints/serve/engine/protocol.py:OpenAIBaseModel",
        "vllm_patches/usage.py adds a field",
        says=("ConfigDict(extra=",),
    ),
    Fact(
        "vllm/v1/engine/llm_engine.py:LLMEngine.add_request",
        "vllm_patches/streaming_input.py refuses sessions before anything is stored",
        says=("isinstance(prompt, EngineCoreRequest)",),
    ),
    Fact(
        f"{CORE}.preprocess_add_request",
        "vllm_patches/streaming_input.py and request_checks.py wrap it",
        takes=("self", "request"),
    ),
    Fact(
        "vllm/v1/engine/input_processor.py:InputProcessor.process_inputs",
        "vllm_patches/request_checks.py looks at what it returns",
        says=(
            "num_ranks = dp_local_size if parallel_config.local_engines_only else "
            "dp_size",
            "sampling_params.max_tokens = self.model_config.max_model_len - prompt_len",
            "return EngineCoreRequest(",
        ),
    ),
    Fact(
        "vllm/v1/engine/core_client.py:MPClient",
        "vllm_patches/request_checks.py divides it by the engines",
        says=("num_gpu_blocks += response.num_gpu_blocks",),
    ),
    Fact(
        "vllm/v1/engine/output_processor.py:OutputProcessor._update_stats_from_finished",
        "vllm_patches/request_stats.py adds the request's arguments",
        takes=("self", "req_state", "finish_reason", "iteration_stats"),
        says=("iteration_stats.update_from_finished_request(",),
    ),
    Fact(
        f"{RUNNER_V1}.execute_model",
        "vllm_patches/request_args.py sees requests come and go",
        takes=("self", "scheduler_output", "intermediate_tensors"),
        says=("num_scheduled_tokens=scheduler_output.num_scheduled_tokens",),
    ),
    Fact(
        "vllm/v1/engine/__init__.py:EngineCoreRequest",
        "vllm_patches/streaming_input.py reads it",
        has=("resumable",),
    ),
    Fact(
        f"{RUNNER_V1}._sample",
        "vllm_patches/cpu_generators.py spares generators while it runs",
        takes=("self", "logits", "spec_decode_metadata"),
    ),
    Fact(
        f"{RUNNER_V1}._bookkeeping_sync",
        "vllm_patches/cpu_generators.py hides generators from this line",
        says=(
            "self.input_batch.generators.get(int(i))",
            "gen.set_offset(gen.get_offset() - 4)",
        ),
    ),
)
