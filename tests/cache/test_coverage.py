"""A policy that did not reach a model's layers ends the start with a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.engine import engine

from hashevict_vllm.config import KVPolicyError, kv_policy

POLICY = {"budget": 128, "segment": 128}


def own_backend(monkeypatch: pytest.MonkeyPatch, layers: tuple[int, ...]) -> None:
    """Give these layers of a Llama a backend of their own, as some models do."""
    from vllm.model_executor.models import llama as model
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    stock = model.Attention

    def attention(*args: Any, **kwargs: Any) -> Any:
        if any(f".{layer}." in kwargs["prefix"] for layer in layers):
            kwargs["attn_backend"] = CPUAttentionBackend
        return stock(*args, **kwargs)

    monkeypatch.setattr(model, "Attention", attention)


@pytest.mark.parametrize("layers", [(1,), (0, 1)], ids=["a part", "all"])
def test_layers_with_a_backend_of_their_own_are_refused_by_its_name(
    layers: tuple[int, ...], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_backend(monkeypatch, layers)
    sentence = (
        rf"--kv-policy: {len(layers)} of 2 attention layers, "
        rf"model\.layers\.{layers[0]}\.self_attn\.attn first, bring their own "
        r"attention backend \(CPU_ATTN\), which a KV policy cannot bound; use "
        r"--kv-policy full\."
    )
    with pytest.raises(KVPolicyError, match=sentence), engine(llama, POLICY):
        pass


def test_without_a_policy_a_backend_of_its_own_is_served(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_backend(monkeypatch, (0, 1))
    with engine(llama) as llm:
        assert llm is not None


def test_a_model_of_which_nothing_is_bounded_is_refused(llama: Path) -> None:
    """Whatever the reason: here no worker reports a layer that is budgeted."""
    import torch
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    from hashevict_vllm.cache.coverage import check_model

    sliding = SlidingWindowSpec(
        block_size=32,
        num_kv_heads=2,
        head_size=32,
        dtype=torch.float32,
        sliding_window=64,
    )
    with engine(llama, POLICY) as llm:
        config = llm.llm_engine.vllm_config
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
        specs = worker.get_kv_cache_spec()
        check_model(config, [{"slides": sliding}, specs])  # two stages, one bounded
        with pytest.raises(KVPolicyError, match="no layer of LlamaForCausalLM keeps"):
            check_model(config, [{"slides": sliding}])


def test_kv_policy_refuses_an_environment_that_does_not_load_the_plugin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    with pytest.raises(KVPolicyError, match=r"VLLM_PLUGINS: .* add hashevict to it"):
        kv_policy(budget=1024)
    assert kv_policy("full") == {"kv_policy": {"name": "full"}}  # stock either way
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver,hashevict")
    assert kv_policy(budget=1024)
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr("hashevict_vllm.config.entry_points", lambda group: ())
    with pytest.raises(KVPolicyError, match="not installed"):
        kv_policy(budget=1024)


def test_the_plugin_is_named_as_pyproject_registers_it() -> None:
    import tomllib

    from hashevict_vllm.config import PLUGIN, PLUGIN_GROUP

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert list(tomllib.loads(text)["project"]["entry-points"][PLUGIN_GROUP]) == [
        PLUGIN
    ]
