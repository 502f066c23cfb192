"""What we rely on in vLLM: an upgrade fails here, in one readable place."""

from __future__ import annotations

import dataclasses
import inspect
from importlib import import_module
from typing import Any

import pytest

SIGNATURES = {
    # The wrapped backend (hashevict_vllm/attention).
    "vllm.v1.attention.backend:AttentionBackend.customize_spec": ["spec"],
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.__init__": [
        "self",
        "kv_cache_spec",
        "layer_names",
        "vllm_config",
        "device",
    ],
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build": [
        "self",
        "common_prefix_len",
        "common_attn_metadata",
        "fast_build",
    ],
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward": [
        "self",
        "layer",
        "query",
        "key",
        "value",
        "kv_cache",
        "attn_metadata",
        "output",
        "output_scale",
        "output_block_scale",
    ],
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update": [
        "self",
        "layer",
        "key",
        "value",
        "kv_cache",
        "slot_mapping",
    ],
    # The manager (hashevict_vllm/cache/manager.py).
    "vllm.v1.core.single_type_kv_cache_manager:"
    "SingleTypeKVCacheManager.remove_skipped_blocks": [
        "self",
        "request_id",
        "processed_computed_tokens",
        "num_prompt_tokens",
    ],
    "vllm.v1.core.single_type_kv_cache_manager:"
    "SingleTypeKVCacheManager.get_num_blocks_to_allocate": [
        "self",
        "request_id",
        "num_tokens",
        "new_computed_blocks",
        "total_computed_tokens",
        "num_local_computed_tokens",
        "num_tokens_main_model",
        "apply_admission_cap",
        "prefill_end",
    ],
    "vllm.v1.core.single_type_kv_cache_manager:"
    "SingleTypeKVCacheManager.allocate_new_blocks": [
        "self",
        "request_id",
        "num_tokens",
        "num_tokens_main_model",
    ],
    "vllm.v1.core.single_type_kv_cache_manager:"
    "SingleTypeKVCacheManager.pop_blocks_for_free": ["self", "request_id"],
    "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register": [
        "kvcache_spec_cls",
        "manager_class",
        "uniform_type_base_spec",
    ],
    # The patches (hashevict_vllm/vllm_patches).
    "vllm.engine.arg_utils:EngineArgs.add_cli_args": ["parser"],
    "vllm.engine.arg_utils:EngineArgs.from_cli_args": ["args"],
    "vllm.v1.core.kv_cache_utils:update_kv_cache_capacity": [
        "vllm_config",
        "kv_cache_config",
    ],
}

SOURCE_FACTS = {
    "allocate_slots frees what is skipped before it counts what is missing": (
        "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
        [
            "full_sequence_must_fit",
            "remove_skipped_blocks(",
            "num_prompt_tokens=",
            "self.coordinator.allocate_new_blocks(",
        ],
    ),
    "layers take their backend from the name get_attn_backend": (
        "vllm.model_executor.layers.attention.attention:Attention.__init__",
        ["self.attn_backend = get_attn_backend(", "has_sliding_window="],
    ),
    "backends may adjust the spec of a layer": (
        "vllm.v1.worker.utils:customize_attention_spec",
        ["backend.customize_spec(spec)"],
    ),
    "the runner passes prompt lengths for R-SWA models only": (
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata",
        ["self.input_batch.num_prompt_tokens_cpu_tensor", "rswa_prefix_lens="],
    ),
    "the engine core logs the capacity once": (
        "vllm.v1.engine.core:EngineCore",
        ["update_kv_cache_capacity("],
    ),
    "the kernel scan reads vars() of every value": (
        "vllm.triton_utils.dispatcher:_rebind_kernels",
        ['vars(value).get("kernel")'],
    ),
    "page padding is a tail that strides account for": (
        "vllm.v1.kv_cache_interface:compute_layout_strides",
        ["page_size_padded", "current_stride = max(current_stride, padded_page_size)"],
    ),
    "worker rows of running requests are append-only": (
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states",
        ["block_ids.extend(new_ids)"],
    ),
}


def resolve(path: str) -> Any:
    """``module:attribute.attribute``, without our patches."""
    module, _, names = path.partition(":")
    target = import_module(module)
    for name in names.split("."):
        target = getattr(target, name)
    while hasattr(target, "hashevict_stock"):
        target = target.hashevict_stock
    return target


@pytest.mark.parametrize("path", SIGNATURES)
def test_hooks_have_the_parameters_we_pass(path: str) -> None:
    assert list(inspect.signature(resolve(path)).parameters) == SIGNATURES[path], (
        f"{path} changed its parameters"
    )


@pytest.mark.parametrize("fact", SOURCE_FACTS)
def test_sources_still_say_what_we_rely_on(fact: str) -> None:
    path, snippets = SOURCE_FACTS[fact]
    source = inspect.getsource(resolve(path))
    at = 0
    for snippet in snippets:
        at = source.find(snippet, at)
        assert at >= 0, f"{fact}: {path} no longer says {snippet!r} (in this order)"


def test_the_common_metadata_have_the_fields_the_plan_replaces() -> None:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    names = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    assert names >= {
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "block_table_tensor",
        "slot_mapping",
        "rswa_prefix_lens",
    }


def test_the_installed_vllm_is_a_supported_one() -> None:
    import vllm

    from hashevict_vllm.compat import is_supported_vllm

    assert is_supported_vllm(vllm.__version__)
