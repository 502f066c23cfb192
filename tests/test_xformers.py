"""The xformers backend: masks, gathered slots, and who is refused.

xformers' own biases, materialized, are the oracle of masks here. No operator of it
runs on a CPU; `tests/interpreted` runs the rest of the path.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext
from itertools import accumulate
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hashevict_vllm import compat, compat_device, plugin
from hashevict_vllm.config import KVPolicyConfig, KVPolicyError, kv_policy

plugin.register()

from support import xformers_reference  # noqa: E402
from support.models import make_llama  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.attention.selector import AttentionSelectorConfig  # noqa: E402
from vllm.v1.kv_cache_layout import KVCacheLayout  # noqa: E402
from xformers.ops.fmha import attn_bias, common, cutlass, flash, flash3  # noqa: E402
from xformers.ops.fmha.common import Inputs  # noqa: E402

from hashevict_vllm.attention import xformers_attend, xformers_calls  # noqa: E402
from hashevict_vllm.attention import xformers_support as support  # noqa: E402
from hashevict_vllm.attention.backend import wrap_backend  # noqa: E402
from hashevict_vllm.attention.xformers_backend import XformersBackend  # noqa: E402
from hashevict_vllm.attention.xformers_impl import XformersImpl  # noqa: E402
from hashevict_vllm.policies.reference import ReferenceLayer  # noqa: E402

N, WIDTH, GROUP = 16, 6, 3
POLICY = KVPolicyConfig.from_dict(
    {"name": "hashevict", "budget": 64, "segment": 32, "recent": 16}
).resolve(512, 16)

BATCHES = {
    "decode, budgets full and not": ([1, 1, 1, 1], [64, 64, 7, 1]),
    "prompts from the start": ([20, 5, 33], [20, 5, 33]),
    "chunks behind a full budget": ([32, 32], [96, 96]),
    "mixed": ([1, 25, 1, 7], [64, 89, 33, 7]),
    "padding between and behind": ([1, 0, 1, 0, 0], [50, 0, 64, 3, 0]),
    "mixed, with padding": ([0, 9, 1, 0], [0, 40, 64, 0]),
    "one token of a prompt": ([1], [1]),
}


def block_table(requests: int) -> torch.Tensor:
    torch.manual_seed(0)
    blocks = torch.randperm(requests * WIDTH) + 1  # block 0 is nobody's
    return blocks.view(requests, WIDTH).int()


def starts_of(counts: list[int]) -> list[int]:
    return [0, *accumulate(counts)]


def attended(calls: list[xformers_calls.Call], rows: int) -> list[set[int]]:
    """For each row of q the places (block * N + slot) that its calls let it see."""
    seen: list[set[int]] = [set() for _ in range(rows)]
    for call in calls:
        places = call.blocks * N + call.slots
        count = call.rows.stop - call.rows.start
        queries = call.bias.q_seqinfo.seqstart_py[-1]
        mask = call.bias.materialize((queries, len(places))) == 0
        mask = mask.view(count, -1, len(places))
        assert mask.shape[1] == (GROUP if call.folded else 1)
        for row, heads in enumerate(mask, call.rows.start):
            assert torch.equal(heads, heads[:1].expand_as(heads))
            assert not seen[row]  # every row is in one call
            seen[row] = set(places[heads[0]].tolist())
    return seen


@pytest.mark.parametrize("most", [32768, 70])
@pytest.mark.parametrize("name", BATCHES)
def test_queries_see_what_the_live_slots_before_them_are(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xformers_calls, "SCRATCH_SLOTS", most)
    counts, lens = BATCHES[name]
    table, starts = block_table(len(counts)), starts_of(counts)
    calls = xformers_calls.plan_calls(starts, lens, table, N, GROUP)
    assert most > 70 or all(
        len(call.slots) <= max(most, *lens) for call in calls if call.slots.numel()
    )
    expected = []
    for request, (count, live) in enumerate(zip(counts, lens, strict=True)):
        order = [int(table[request, s // N]) * N + s % N for s in range(live)]
        expected += [set(order[: live - count + 1 + i]) for i in range(count)]
    assert attended(calls, starts[-1]) == expected


@pytest.mark.parametrize("name", BATCHES)
def test_queries_see_what_a_paged_bias_of_xformers_lets_them(name: str) -> None:
    counts, lens = BATCHES[name]
    table, starts = block_table(len(counts)), starts_of(counts)
    calls = xformers_calls.plan_calls(starts, lens, table, N, GROUP)
    paged = attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        counts, lens, table, N
    )
    mask = paged.materialize((starts[-1], len(counts) * WIDTH * N)) == 0
    expected = [set(row.nonzero().flatten().tolist()) for row in mask]
    assert attended(calls, starts[-1]) == expected


def test_packed_keys_suit_every_operator_and_paged_ones_not_the_old_gpus() -> None:
    """Why slots are gathered one behind the other, and not page by page."""
    packed = {
        attn_bias.BlockDiagonalMask,
        attn_bias.BlockDiagonalCausalFromBottomRightMask,
    }
    for operator in (cutlass.FwOp, flash.FwOp, flash3.FwOp):
        assert packed <= set(operator.SUPPORTED_ATTN_BIAS_TYPES)
    paged = attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
    assert paged not in cutlass.FwOp.SUPPORTED_ATTN_BIAS_TYPES
    assert cutlass.FwOp.CUDA_MINIMUM_COMPUTE_CAPABILITY < (7, 0)
    assert flash.FwOp.CUDA_MINIMUM_COMPUTE_CAPABILITY == (8, 0)


def test_the_oracle_is_causal_as_xformers_is() -> None:
    torch.manual_seed(0)
    heads, dim, chunks = 2, 8, [5, 1, 1, 9]
    layer = ReferenceLayer(POLICY, 100, heads, dim)  # the budget is never full
    q, k, v = (torch.randn(sum(chunks), n, dim) for n in (heads * GROUP, heads, heads))
    got = torch.cat(
        [
            layer.forward(q[rows], k[rows], v[rows], 0.5)
            for rows in torch.arange(sum(chunks)).split(chunks)
        ]
    )
    expected, end = [], 0
    for count in chunks:
        rows, end = slice(end, end + count), end + count
        bias = attn_bias.BlockDiagonalMask.from_seqlens([count], [end])
        shape = (1, -1, heads, GROUP, dim)
        grouped = (1, end, heads, GROUP, dim)
        expected.append(
            xformers_reference.attention(
                q[rows].view(shape),
                k[None, :end, :, None].expand(grouped),
                v[None, :end, :, None].expand(grouped),
                bias.make_causal_from_bottomright(),
                0.5,
            )
        )
    torch.testing.assert_close(got, torch.cat(expected, 1)[0].flatten(1, 2))


# -- gathering -------------------------------------------------------------------

LAYOUTS = [layout for layout in KVCacheLayout if layout.is_block_compact]


def poisoned_cache(
    layout: KVCacheLayout, blocks: int, heads: int, dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """[B, H, N, 2D] of the second of three layers; every page ends in a tail of NaN."""
    layers, content, tail = 3, 2 * dim, 40
    page = heads * N * content + tail
    raw = torch.full((layers * blocks * page,), float("nan"), dtype=dtype)
    outer = {"LB": (blocks * page, page), "BL": (page, layers * page)}
    inner = {"HN": (N * content, content), "NH": (content, heads * content)}
    name = layout.name
    layer, block = outer[name[:2]]
    cache = raw.as_strided(
        (blocks, heads, N, content), (block, *inner[name[2:4]], 1), layer
    )
    cache.copy_(torch.randn(cache.shape))
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_gathered_slots_are_those_of_the_pages(
    layout: KVCacheLayout, dtype: torch.dtype
) -> None:
    heads, dim, (counts, lens) = 2, 8, BATCHES["mixed"]
    table = block_table(len(counts))
    cache = poisoned_cache(layout, int(table.max()) + 1, heads, dim, dtype)
    calls = xformers_calls.plan_calls(starts_of(counts), lens, table, N, GROUP)
    (call,) = calls
    k, v = xformers_attend.gather(cache, call)
    at = 0
    for request, live in enumerate(lens):
        for slot in range(live):
            place = cache[int(table[request, slot // N]), :, slot % N]
            assert torch.equal(k[at], place[:, :dim])
            assert torch.equal(v[at], place[:, dim:])
            at += 1
    assert at == len(k) == len(v)
    # As operators want it: heads side by side, no further copy.
    assert k.stride() == v.stride() == (heads * 2 * dim, 2 * dim, 1)


def test_all_layouts_that_a_page_with_a_tail_may_have_were_tried() -> None:
    assert {layout.name for layout in LAYOUTS} == {"LBNHC", "LBHNC", "BLNHC", "BLHNC"}


@pytest.mark.parametrize("name", BATCHES)
def test_a_step_is_planned_without_asking_the_device(name: str) -> None:
    """A fake tensor has no value to tell: asking for one raises."""
    counts, lens = BATCHES[name]
    with FakeTensorMode():
        table = torch.empty(len(counts), WIDTH, dtype=torch.int32)
        cache = torch.empty(99, 2, N, 16)
        calls = xformers_calls.plan_calls(starts_of(counts), lens, table, N, GROUP)
        live = sum(n for count, n in zip(counts, lens, strict=True) if count)
        assert sum(len(xformers_attend.gather(cache, c)[0]) for c in calls) == live


class Streams:
    """In the place of CUDA's: CUTLASS starts one for every KV head of a prompt."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass


@pytest.mark.parametrize("name", BATCHES)
def test_torch_accepts_what_cutlass_is_called_with(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`aten._efficient_attention_forward` checks shapes of fake tensors, too."""

    def operator(q: Any, k: Any, v: Any, bias: Any, scale: float) -> Any:
        return cutlass.FwOp.apply(Inputs(q, k, v, bias, scale=scale), False)[0]

    monkeypatch.setattr(xformers_reference.SEAM, operator)
    monkeypatch.setattr(torch.cuda, "current_stream", Streams)
    monkeypatch.setattr(torch.cuda, "Stream", Streams)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    counts, lens = BATCHES[name]
    with FakeTensorMode():
        table = torch.empty(len(counts), WIDTH, dtype=torch.int32)
        cache = torch.empty(99, 2, N, 16, dtype=torch.float16)
        query = torch.empty(sum(counts), 2 * GROUP, 8, dtype=torch.float16)
        for call in xformers_calls.plan_calls(starts_of(counts), lens, table, N, GROUP):
            k, v = xformers_attend.gather(cache, call)
            rows = query[call.rows]
            output = xformers_attend.attend(rows, k, v, call, 0.5)
            assert output.shape == rows.shape


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
def wrapped() -> Any:
    with mock.patch.object(compat_device, "on_cpu", return_value=False):
        yield wrap_backend(XformersBackend, POLICY)
    wrap_backend.cache_clear()


def test_it_is_wrapped_and_stays_out_of_graphs(wrapped: Any) -> None:
    assert issubclass(wrapped, XformersBackend)
    assert wrapped.get_name() == "CUSTOM"
    assert issubclass(wrapped.get_impl_cls(), XformersImpl)
    graphs = wrapped.get_builder_cls().get_cudagraph_support(None, None)
    assert graphs == AttentionCGSupport.NEVER
    assert set(wrapped.supported_kv_cache_layouts()) == set(LAYOUTS)
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


def refusal(config: Any) -> str | None:
    """The sentence of `compat.check` on a GPU; None if it starts."""
    cuda = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True)
    with mock.patch("vllm.platforms.current_platform", cuda):
        try:
            compat.check(config)
        except KVPolicyError as error:
            text = str(error)
            assert text.endswith(".")
            assert text.count(". ") == 0
            return text
    return None


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
