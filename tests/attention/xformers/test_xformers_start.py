"""The xformers backend: what vLLM is told of it, and who is refused.

What vLLM's own code decides is decided by that code.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from hashevict_vllm import plugin
from hashevict_vllm.config import KVPolicyConfig, KVPolicyError, kv_policy

plugin.register()

from support.models import make_llama  # noqa: E402
from support.platforms import refusal  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.attention.selector import AttentionSelectorConfig  # noqa: E402
from xformers.ops.fmha import common, flash  # noqa: E402

from hashevict_vllm.attention.backend import wrap_backend  # noqa: E402
from hashevict_vllm.attention.xformers import support  # noqa: E402
from hashevict_vllm.attention.xformers.backend import XformersBackend  # noqa: E402
from hashevict_vllm.attention.xformers.impl import XformersImpl  # noqa: E402

POLICY = KVPolicyConfig.from_dict(
    {"name": "hashevict", "budget": 64, "segment": 32, "recent": 16}
).resolve(512, 16)

# -- what vLLM is told -----------------------------------------------------------


def selector(**changes: Any) -> AttentionSelectorConfig:
    plain = AttentionSelectorConfig(
        head_size=64, dtype=torch.float16, kv_cache_dtype="auto", block_size=16
    )
    return plain._replace(**changes)


def reasons(capability: tuple[int, int] = (7, 0), **changes: Any) -> list[str]:
    """VLLM's own verdict, as on a machine where xformers' extension was loaded."""
    with mock.patch.object(common, "_built_with_cuda", True):
        return XformersBackend.validate_configuration(
            device_capability=DeviceCapability(*capability),
            **selector(**changes)._asdict(),
        )


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 0), torch.float16),
        ((7, 0), torch.float16),
        ((7, 5), torch.float32),
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
    ],
)
def test_gpus_that_cutlass_serves_are_accepted(
    capability: tuple[int, int], dtype: torch.dtype
) -> None:
    assert reasons(capability, dtype=dtype) == []


@pytest.mark.parametrize(
    ("capability", "changes", "fragment"),
    [
        ((7, 5), {"dtype": torch.bfloat16}, "use --dtype float16"),
        ((12, 0), {"dtype": torch.float32}, "ends at capability (9, 0)"),
        ((7, 0), {"head_size": 12}, "not a multiple of 16 bytes"),
        ((7, 0), {"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ((7, 0), {"has_sliding_window": True}, "sliding window not supported"),
        ((7, 0), {"has_sink": True}, "attention sinks not supported"),
        ((7, 0), {"use_mla": True}, "MLA not supported"),
        ((7, 0), {"attn_type": "encoder"}, "attention type encoder not supported"),
        ((7, 0), {"use_non_causal": True}, "non-causal attention not supported"),
        ((7, 0), {"use_mm_prefix": True}, "partial multimodal token"),
        ((7, 0), {"use_rswa": True}, "R-SWA not supported"),
        ((7, 0), {"use_batch_invariant": True}, "batch invariance not supported"),
        ((7, 0), {"use_adaptive_verification": True}, "query lens mismatch"),
    ],
)
def test_what_is_not_served_is_declared_to_vllm(
    capability: tuple[int, int], changes: dict[str, Any], fragment: str
) -> None:
    (reason,) = reasons(capability, **changes)
    assert fragment in reason


def test_gpus_that_only_flash_serves_need_it_built() -> None:
    """Newer than CUTLASS's operator; flash is not in a torch without CUDA."""
    (reason,) = reasons((12, 0))
    assert reason.startswith("xformers has no operator for this: fa3F")
    assert "cutlassF-pt ends at capability (9, 0)" in reason
    with mock.patch.object(flash.FwOp, "OPERATOR", print):
        assert reasons((12, 0)) == []


def test_an_extension_that_does_not_load_is_a_reason() -> None:
    """As on this machine, which has no CUDA."""
    assert not common._built_with_cuda
    text = support.unsupported(64, torch.float16, (8, 0))
    assert text == (
        "xformers could not load its extension (see python -m xformers.info)"
    )


@pytest.fixture
def wrapped(cuda: Any) -> Any:
    return wrap_backend(XformersBackend, POLICY)


def test_it_is_wrapped_and_stays_out_of_graphs(wrapped: Any) -> None:
    assert issubclass(wrapped, XformersBackend)
    assert wrapped.get_name() == "CUSTOM"
    assert issubclass(wrapped.get_impl_cls(), XformersImpl)
    graphs = wrapped.get_builder_cls().get_cudagraph_support(None, None)
    assert graphs == AttentionCGSupport.NEVER
    layouts = {layout.name for layout in wrapped.supported_kv_cache_layouts()}
    assert layouts == {"LBNHC", "LBHNC", "BLNHC", "BLHNC"}
    assert not wrapped.supports_kv_connector()


@pytest.mark.parametrize(("longest", "slots"), [(1000, 32768), (90000, 40064)])
def test_memory_for_gathered_slots_is_taken_while_vllm_profiles(
    longest: int, slots: int, wrapped: Any
) -> None:
    policy = KVPolicyConfig.from_dict(
        {"name": "hashevict", "budget": 64, "segment": 40000}
    ).resolve(longest, 16)
    config = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=longest)
    kind = type("Impl", (wrapped.get_impl_cls(),), {"policy": policy})
    with set_current_vllm_config(config):
        impl = kind(4, 32, 1.0, 2)
    query = torch.ones(3, 4, 32, dtype=torch.float16)
    with mock.patch("torch.empty", wraps=torch.empty) as empty:
        output = impl.forward(None, query, None, None, None, None, query.clone())
    assert not output.any()
    empty.assert_called_once_with(
        (slots, 2, 64), dtype=torch.float16, device=query.device
    )


# -- what is refused -------------------------------------------------------------


def make(**features: Any) -> XformersImpl:
    kind = type("Impl", (XformersImpl,), {"policy": POLICY})
    return kind(4, 32, 1.0, 2, **features)


def test_without_a_policy_it_is_refused_when_a_layer_is_made() -> None:
    with pytest.raises(KVPolicyError) as error:
        XformersImpl(4, 32, 1.0, 2)
    assert str(error.value) == (
        "--attention-backend: CUSTOM is hashevict-vllm's path to xformers, which reads "
        "caches that a KV policy bounds; set --kv-policy or name another backend."
    )


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"sliding_window": 128}, "sliding window"),
        ({"logits_soft_cap": 30.0}, "soft cap of logits"),
        ({"sinks": torch.ones(4)}, "'sinks'"),
    ],
)
def test_features_of_models_that_vllm_has_no_hook_for_are_refused(
    features: dict[str, Any], name: str
) -> None:
    assert make(sinks=None, use_alibi_sqrt=False, logits_soft_cap=0.0).num_heads == 4
    with pytest.raises(KVPolicyError) as error:
        make(**features)
    assert str(error.value) == (
        f"--attention-backend: CUSTOM (xformers) has no {name}, which this model "
        "wants; name another backend."
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = make_llama(tmp_path_factory.mktemp("model") / "model")
    args = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        max_model_len=2048,
        block_size=32,
        dtype="float16",
        attention_backend="CUSTOM",
        additional_config=kv_policy(budget=512),
    )
    return args.create_engine_config()


def test_a_gpu_with_xformers_starts(config: Any) -> None:
    assert refusal(config) is None


def test_it_may_be_the_backend_of_full_attention_layers_only(config: Any) -> None:
    other = {"full_attention": AttentionBackendEnum.FLEX_ATTENTION}
    with mock.patch.object(config.attention_config, "backend_per_kind", other):
        assert str(refusal(config)).startswith("--attention-backend: FLEX_ATTENTION ")


def test_a_machine_without_xformers_is_refused(config: Any) -> None:
    with mock.patch.object(importlib.util, "find_spec", return_value=None):
        assert refusal(config) == (
            "--attention-backend: CUSTOM cannot be served, as xformers is not "
            "installed (pip install 'hashevict-vllm[xformers]')."
        )


def test_fp8_caches_are_refused(config: Any) -> None:
    with mock.patch.object(config.cache_config, "cache_dtype", "fp8"):
        assert refusal(config) == (
            "--kv-cache-dtype: fp8 is quantised, which --attention-backend CUSTOM "
            "(xformers) cannot read; use auto."
        )


def test_another_plugins_backend_is_kept_and_refused(config: Any) -> None:
    code = (
        "from vllm.v1.attention.backends.registry import *\n"
        "register_backend(AttentionBackendEnum.CUSTOM, 'another.Backend')\n"
        "from hashevict_vllm import plugin; plugin.register()\n"
        "from hashevict_vllm.attention.inner import refuse_backend\n"
        "print(refuse_backend('CUSTOM'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == (
        "--attention-backend: CUSTOM (another.Backend) is not one that a KV policy "
        "knows how to wrap; use one of FLASHINFER, FLASH_ATTN, TRITON_ATTN."
    )


def test_the_plugin_names_it_and_imports_no_xformers() -> None:
    code = (
        "import sys\n"
        "from hashevict_vllm import plugin; plugin.register(); plugin.register()\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum\n"
        "print(AttentionBackendEnum['CUSTOM'].get_class().__name__,\n"
        "      [m for m in sys.modules if m.startswith('xformers')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ},
    )
    assert done.stdout.splitlines()[-1] == "XformersBackend []"
