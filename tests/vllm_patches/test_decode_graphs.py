"""Which CUDA graphs a budget takes part in, as vLLM's own code decides it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hashevict_vllm import plugin
from hashevict_vllm.config import KVPolicyConfig

plugin.register()

from vllm.config import CompilationConfig, CUDAGraphMode, VllmConfig  # noqa: E402
from vllm.v1.attention.backend import (  # noqa: E402
    AttentionCGSupport,
    AttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.worker.gpu.cudagraph_utils import (  # noqa: E402
    BatchExecutionDescriptor,
    _is_compatible,
)
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2  # noqa: E402
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1  # noqa: E402

from hashevict_vllm.attention.backend import wrap_backend  # noqa: E402
from hashevict_vllm.attention.gpu.metadata import (  # noqa: E402
    DeviceMetadataBuilderMixin,
)

POLICY = KVPolicyConfig.from_dict({"name": "hashevict", "budget": 64}).resolve(512, 16)


@pytest.mark.parametrize("name", ["FLASH_ATTN", "TRITON_ATTN"])
def test_only_single_token_decodes_run_in_full_graphs(name: str, cuda: Any) -> None:
    builder = wrap_backend(
        AttentionBackendEnum[name].get_class(), POLICY
    ).get_builder_cls()
    support = builder.get_cudagraph_support(VllmConfig(), None)
    assert support == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert builder.get_varlen_cudagraph_max_query_len(VllmConfig(), None) is None
    compilation = CompilationConfig(cudagraph_mode=CUDAGraphMode.FULL)
    mode = compilation.resolve_cudagraph_mode_and_sizes(support, name)
    assert mode.decode_mode() == CUDAGraphMode.FULL
    assert mode.mixed_mode() != CUDAGraphMode.FULL


def test_a_backend_without_graphs_gets_none(cuda: Any) -> None:
    class Without(DeviceMetadataBuilderMixin, AttentionMetadataBuilder):
        pass

    support = Without.get_cudagraph_support(VllmConfig(), None)
    assert support == AttentionCGSupport.NEVER


STOCK, BUDGETED = (
    SimpleNamespace(decode_graphs_serve_prompts=serve) for serve in (True, False)
)
# Tokens read before the step, of prompts of 40 tokens: both decode; one has a last
# token to read; that is so for both.
ONE_TOKEN_STEPS = {"decode": [40, 47], "mixed": [39, 47], "prompts": [39, 12]}


def group_of(builder: Any) -> Any:
    return SimpleNamespace(
        metadata_builders=[builder], get_metadata_builder=lambda index=0: builder
    )


def replays_decode_graph_v2(builder: Any, computed: list[int]) -> bool:
    """Whether V2 finds a decode graph for two requests of one token each."""
    states = SimpleNamespace(
        req_id_to_index={"a": 0, "b": 1},
        prefill_len=SimpleNamespace(np=np.array([40, 40])),
        num_computed_prefill_tokens=np.minimum(computed, 40),
    )
    runner = SimpleNamespace(
        req_states=states,
        decode_query_len=1,
        use_pp=False,
        pcp_manager=None,
        adaptive_verification=None,
        attn_groups=[[group_of(builder)]],
    )
    output = SimpleNamespace(
        num_scheduled_tokens={"a": 1, "b": 1},
        total_num_scheduled_tokens=2,
        scheduled_spec_decode_tokens={},
    )
    state, uniform = RunnerV2.gather_batch_req_state(runner, output, False)
    longest = None if state.has_prefill else 1  # execute_model
    graph = BatchExecutionDescriptor(CUDAGraphMode.FULL, 2, 2, uniform_token_count=1)
    return _is_compatible(graph, 2, 2, uniform, 0, longest, 1)


def replays_decode_graph_v1(builder: Any, computed: list[int]) -> bool:
    """The same for V1."""
    asked: dict[str, Any] = {}

    def dispatch(**kwargs: Any) -> tuple[Any, Any]:
        asked.update(kwargs)
        return CUDAGraphMode.NONE, SimpleNamespace(num_tokens=2)

    runner = SimpleNamespace(
        _is_uniform_decode=RunnerV1._is_uniform_decode,
        _attn_group_iterator=lambda: iter([group_of(builder)]),
        uniform_decode_query_len=1,
        model_config=SimpleNamespace(is_encoder_decoder=False),
        cudagraph_dispatcher=SimpleNamespace(dispatch=dispatch),
        input_batch=SimpleNamespace(
            num_computed_tokens_cpu=np.array(computed),
            num_prompt_tokens=np.array([40, 40]),
            lora_id_to_lora_request={},
        ),
        vllm_config=SimpleNamespace(
            parallel_config=SimpleNamespace(data_parallel_size=1),
            observability_config=SimpleNamespace(cudagraph_metrics=False),
        ),
    )
    RunnerV1._determine_batch_execution_and_padding(
        runner,
        num_tokens=2,
        num_reqs=2,
        num_scheduled_tokens_np=np.array([1, 1]),
        max_num_scheduled_tokens=1,
    )
    return asked["uniform_decode"]


@pytest.mark.parametrize("step", ONE_TOKEN_STEPS)
@pytest.mark.parametrize("replays", [replays_decode_graph_v1, replays_decode_graph_v2])
def test_prompts_of_one_token_stay_out_of_decode_graphs(
    replays: Any, step: str
) -> None:
    computed = ONE_TOKEN_STEPS[step]
    assert replays(BUDGETED, computed) == (step == "decode")
    assert replays(STOCK, computed)  # stock vLLM would replay one
