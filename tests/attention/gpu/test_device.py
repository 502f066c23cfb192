"""How things are put together on CUDA, with the platform faked where vLLM asks for it.

No kernel runs here: `tests/interpreted` runs them, and whole engines. What vLLM's own
code decides (graphs, modes, refusals) is decided by that code.
"""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hashevict_vllm import plugin
from hashevict_vllm.config import KVPolicyConfig, KVPolicyError, kv_policy

plugin.register()

from support.models import make_llama  # noqa: E402
from support.platforms import refusal  # noqa: E402
from vllm.config import (  # noqa: E402
    VllmConfig,
    set_current_vllm_config,
)
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.v1.attention.backend import (  # noqa: E402
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402
from vllm.v1.kv_cache_layout import KVCacheLayout  # noqa: E402

from hashevict_vllm.attention.backend import wrap_backend  # noqa: E402
from hashevict_vllm.attention.gpu.constants import DeviceConstants  # noqa: E402
from hashevict_vllm.attention.gpu.fork import Fork, join_after  # noqa: E402
from hashevict_vllm.attention.gpu.forward import DeviceImplMixin  # noqa: E402
from hashevict_vllm.attention.gpu.metadata import (  # noqa: E402
    DeviceMetadataBuilderMixin,
)
from hashevict_vllm.attention.impl import LayerStep  # noqa: E402
from hashevict_vllm.attention.inner import InnerBackend  # noqa: E402
from hashevict_vllm.cache.spec import BudgetedAttentionSpec  # noqa: E402
from hashevict_vllm.vllm_patches import model_runner_v2  # noqa: E402

POLICY = KVPolicyConfig.from_dict(
    {"name": "hashevict", "budget": 64, "segment": 32, "recent": 16}
).resolve(512, 16)


def spec_of(heads: int, dtype: torch.dtype) -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=16, num_kv_heads=heads, head_size=32, dtype=dtype
    )


@pytest.fixture
def config(tmp_path: Any) -> Any:
    """A finished configuration with a policy, made on the real platform."""
    model = make_llama(tmp_path / "model")
    args = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        max_model_len=2048,
        block_size=32,
        additional_config=kv_policy(budget=512),
    )
    return args.create_engine_config()


# -- what is refused -------------------------------------------------------------


def test_a_policy_starts_on_cuda(config: Any) -> None:
    assert refusal(config) is None


@pytest.mark.parametrize("name", ["rocm", "xpu"])
def test_other_devices_are_refused_by_name(name: str, config: Any) -> None:
    text = refusal(config, name)
    assert text == (
        f"--kv-policy: the {name} platform is not supported, only CPU and CUDA are."
    )


def test_a_rule_without_gpu_kernel_is_refused_on_cuda_only(config: Any) -> None:
    config.additional_config = kv_policy("key_diff", budget=512)
    config.cache_config.enable_prefix_caching = False
    assert refusal(config, "cpu") is None
    assert str(refusal(config)).startswith("--kv-policy: key_diff reads every live key")


@pytest.mark.parametrize("name", ["FLASH_ATTN", "TRITON_ATTN", "FLASHINFER"])
def test_the_backends_that_can_be_wrapped_are_accepted(name: str, config: Any) -> None:
    config.attention_config.backend = AttentionBackendEnum[name]
    assert refusal(config) is None


def test_another_backend_is_refused_by_its_name(config: Any) -> None:
    config.attention_config.backend = AttentionBackendEnum.FLEX_ATTENTION
    text = str(refusal(config))
    assert text.startswith("--attention-backend: FLEX_ATTENTION is not one")
    assert "FLASHINFER, FLASH_ATTN, TRITON_ATTN" in text


@pytest.mark.parametrize(
    ("dtype", "served"),
    [("fp8", True), ("fp8_e4m3", True), ("fp8_e5m2", False), ("nvfp4", False)],
)
def test_fp8_caches_with_one_scale_are_served_on_cuda(
    dtype: str, served: bool, config: Any
) -> None:
    config.cache_config.cache_dtype = dtype
    assert str(refusal(config, "cpu")).startswith(f"--kv-cache-dtype: {dtype}")
    text = refusal(config)
    assert text is None if served else f"{dtype} is not among" in str(text)


def test_microbatches_are_refused(config: Any) -> None:
    config.parallel_config.enable_dbo = True
    assert str(refusal(config)).startswith("--enable-dbo: ")


# -- what is wrapped -------------------------------------------------------------


@pytest.mark.parametrize("name", ["FLASH_ATTN", "TRITON_ATTN"])
def test_the_backend_that_vllm_chose_is_wrapped(name: str, cuda: Any) -> None:
    inner = AttentionBackendEnum[name].get_class()
    wrapped = wrap_backend(inner, POLICY)
    assert issubclass(wrapped, inner)
    assert wrapped.get_name() == name
    assert wrapped.forward_includes_kv_cache_update
    impl, builder = wrapped.get_impl_cls(), wrapped.get_builder_cls()
    assert impl.__bases__ == (DeviceImplMixin, inner.get_impl_cls())
    assert builder.__bases__ == (DeviceMetadataBuilderMixin, inner.get_builder_cls())
    assert impl.needs.takes_fp8_queries
    assert not builder.needs.plans_on_host
    assert wrapped.get_supported_kernel_block_sizes() == (
        inner.get_supported_kernel_block_sizes()
    )
    spec = spec_of(2, torch.bfloat16)
    assert isinstance(wrapped.customize_spec(spec), BudgetedAttentionSpec)


@pytest.mark.parametrize(
    ("sizes", "served"),
    [([16, 32, 64], False), ([MultipleOf(16)], True), ([128], True)],
)
def test_blocks_that_a_backend_would_split_are_refused(
    sizes: list[Any], served: bool, cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # FLASHINFER's sizes, but for GPUs that take pages of 128 tokens.
    inner = AttentionBackendEnum.TRITON_ATTN.get_class()
    monkeypatch.setattr(
        inner, "get_supported_kernel_block_sizes", staticmethod(lambda: sizes)
    )
    wrapped = wrap_backend(inner, POLICY)
    spec = FullAttentionSpec(
        block_size=128, num_kv_heads=2, head_size=32, dtype=torch.bfloat16
    )
    if served:
        assert isinstance(wrapped.customize_spec(spec), BudgetedAttentionSpec)
        return
    expected = r"^--block-size: TRITON_ATTN reads blocks of 16 or 32 or 64 tokens, "
    with pytest.raises(KVPolicyError, match=expected):
        wrapped.customize_spec(spec)


def test_pages_are_laid_out_so_that_a_tail_fits(cuda: Any) -> None:
    wrapped = wrap_backend(AttentionBackendEnum.FLASH_ATTN.get_class(), POLICY)
    layouts = wrapped.supported_kv_cache_layouts()
    assert layouts[0] == KVCacheLayout.LBNHC  # what stock vLLM prefers as well
    assert not {KVCacheLayout.LHBNC, KVCacheLayout.BHLNC} & set(layouts)


def test_a_backend_chosen_by_vllm_can_be_refused_too(cuda: Any) -> None:
    flex = AttentionBackendEnum.FLEX_ATTENTION.get_class()
    with pytest.raises(KVPolicyError, match=r"^--attention-backend: FLEX_ATTENTION "):
        wrap_backend(flex, POLICY)


def test_a_cpu_imports_no_gpu_kernels() -> None:
    code = (
        "import sys\n"
        "from hashevict_vllm import plugin; plugin.register()\n"
        "from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend\n"
        "from hashevict_vllm.attention.backend import wrap_backend\n"
        "from hashevict_vllm.config import KVPolicyConfig\n"
        "policy = KVPolicyConfig.from_dict({'name': 'hashevict', 'budget': 256})\n"
        "wrap_backend(CPUAttentionBackend, policy.resolve(4096, 32))\n"
        "print([m for m in sys.modules if m.startswith('hashevict_vllm.kernels.tri')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


# -- work beside attention -------------------------------------------------------


def test_forked_work_waits_for_what_came_before_and_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name if isinstance(name, str) else "side"

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

        def __enter__(self) -> None:
            log.append(f"on {self.name}")

        def __exit__(self, *_: Any) -> None:
            log.append("back")

    main = Stream("main")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    fork = Fork(torch.device("cuda"))
    fork.join()
    assert log == []  # nothing is under way
    fork.start(lambda: log.append("work"))
    begun = ["side waits for main", "on side", "work", "back"]
    assert log == begun
    fork.join()
    fork.join()
    assert log == [*begun, "main waits for side"]


def test_what_the_last_layer_forks_is_joined_when_the_model_ends() -> None:
    log: list[str] = []
    model, fork = torch.nn.Linear(1, 1), Fork(torch.device("cpu"))
    join_after(model)
    fork.start(lambda: log.append("ballot"))
    assert log == []
    assert not fork.ends_with_model  # as yet it is the last layer that joins
    model(torch.zeros(1, 1))
    assert log == ["ballot"]
    assert fork.ends_with_model


# -- planning a step -------------------------------------------------------------


class HostPlanner(AttentionMetadataBuilder):
    """An inner builder whose metadata are its own state, as FlashInfer's are."""

    def __init__(self, spec: Any, names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(spec, names, vllm_config, device)
        self.plan: list[int] = []

    def build(self, common_prefix_len: int, common: Any, fast_build: bool = False):  # type: ignore[no-untyped-def]
        self.plan[:] = common.seq_lens.tolist()
        return self.plan


def make_builder(needs: InnerBackend) -> Any:
    kind = type("Builder", (DeviceMetadataBuilderMixin, HostPlanner), {"needs": needs})
    stock = spec_of(1, torch.float32)
    impl = SimpleNamespace(num_queries_per_kv=1, scale=1.0, kv_cache_dtype="auto")
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=128, max_num_seqs=4),
        model_config=SimpleNamespace(max_model_len=512, dtype=torch.float32),
        compilation_config=SimpleNamespace(
            max_cudagraph_capture_size=0,
            static_forward_context={"layer": SimpleNamespace(impl=impl)},
        ),
    )
    spec = BudgetedAttentionSpec.from_stock(stock, POLICY)
    return kind(spec, ["layer"], config, torch.device("cpu"))


def common_of(prompt: int, start: int, count: int, **changes: Any) -> Any:
    lens = torch.tensor([start + count], dtype=torch.int32)
    starts = torch.tensor([0, count], dtype=torch.int32)
    values = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": lens,
        "num_reqs": 1,
        "num_actual_tokens": count,
        "max_query_len": count,
        "max_seq_len": start + count,
        "block_table_tensor": torch.zeros(1, 32, dtype=torch.int32),
        "slot_mapping": torch.zeros(count, dtype=torch.int64),
        "is_prefilling": torch.tensor([start < prompt]),
        "seq_lens_cpu_upper_bound": lens,
        "rswa_prefix_lens": torch.tensor([prompt]),
        **changes,
    }
    return CommonAttentionMetadata(**values)


def test_rounds_of_a_backend_that_plans_on_the_host_are_planned_one_by_one() -> None:
    builder = make_builder(InnerBackend(plans_on_host=True))
    first, second, third = builder.build(0, common_of(120, 0, 128 - 16)).rounds
    assert [part.inner()[0] for part in (first, second, third)] == [64, 96, 80]
    # For the next layer the first round is planned again.
    assert first.inner() == [64]


def test_a_step_of_one_round_is_planned_once_for_all_layers() -> None:
    builder = make_builder(InnerBackend(plans_on_host=True))
    (part,) = builder.build(0, common_of(120, 0, 60)).rounds
    builder.plan[:] = [-1]
    assert part.inner() == [-1]


def test_a_batch_that_vllm_makes_up_is_attended_but_not_written() -> None:
    builder = make_builder(InnerBackend())
    made_up = {"is_prefilling": torch.tensor([False])}
    for lengths in (None, torch.tensor([0])):
        common = common_of(0, 0, 100, rswa_prefix_lens=lengths, **made_up)
        (part,) = builder.build(0, common).rounds
        assert part.token_piece.tolist() == [-1] * 100
        assert not part.pieces.any()
        assert part.reduced is None
        assert part.inner() == [100]


def test_a_prompt_of_unknown_length_is_an_error() -> None:
    builder = make_builder(InnerBackend())
    with pytest.raises(RuntimeError, match="no lengths of the prompts"):
        builder.build(0, common_of(120, 0, 60, rswa_prefix_lens=None))


# -- fp8 -------------------------------------------------------------------------


class Fp8Inner:
    """An inner implementation that wants its queries quantised."""

    supports_quant_query_input = True
    kv_cache_dtype = "fp8"

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        pass

    def forward(self, layer: Any, query: torch.Tensor, *args: Any) -> None:
        self.seen = query


def test_queries_are_quantised_for_attention_but_not_for_the_rule() -> None:
    kind = type("Impl", (DeviceImplMixin, Fp8Inner), {"policy": POLICY})
    kind.needs = InnerBackend(takes_fp8_queries=True)
    with set_current_vllm_config(VllmConfig()):
        impl = kind()
    assert not impl.supports_quant_query_input  # Attention.__init__ asks now
    impl.process_weights_after_loading(torch.bfloat16)
    assert impl.supports_quant_query_input  # FlashAttentionImpl.forward asks now
    query = torch.randn(3, 2, 32, dtype=torch.bfloat16)
    layer = SimpleNamespace(_q_scale=torch.tensor(0.5))
    step = LayerStep(
        layer, query, query, query, query, None, torch.empty_like(query), None
    )
    impl.attend(impl._with_quantised_queries(step), None, None)
    assert impl.seen.dtype == torch.float8_e4m3fn
    assert torch.equal(impl.seen.float(), (query / 0.5).to(impl.seen.dtype).float())
    assert step.query is query


def test_scales_per_head_are_refused() -> None:
    one, per_head = torch.ones(1), torch.ones(2)
    layer = SimpleNamespace(
        impl=SimpleNamespace(kv_cache_dtype="fp8"),
        **{"_q_scale": one, "_k_scale": per_head, "_v_scale": one},
    )
    stock = spec_of(2, torch.uint8)
    spec = BudgetedAttentionSpec.from_stock(stock, POLICY)
    with pytest.raises(KVPolicyError, match=r"^--kv-cache-dtype: .* scale for every"):
        DeviceConstants.build(layer, spec, None, one.device)


# -- prompt lengths --------------------------------------------------------------


@pytest.mark.parametrize("policy", [{}, kv_policy(budget=512)])
def test_prompt_lengths_are_passed_where_a_policy_is_on(policy: dict[str, Any]) -> None:
    made = SimpleNamespace(prompt_lens=None, idx_mapping_np=np.array([2, 0]))
    runner = SimpleNamespace(
        vllm_config=SimpleNamespace(additional_config=policy),
        req_states=SimpleNamespace(
            prompt_len=SimpleNamespace(np=np.array([7, 8, 9], np.int32))
        ),
    )
    wrapped = model_runner_v2.wrap(lambda self: made)
    batch = wrapped(runner)
    if policy:
        assert batch.prompt_lens.tolist() == [9, 7]
    else:
        assert batch.prompt_lens is None
