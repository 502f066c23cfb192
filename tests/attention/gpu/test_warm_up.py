"""Kernels that serving reaches are compiled before it begins; none of them runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionMetadataBuilder

from hashevict_vllm.config import KVPolicyConfig
from hashevict_vllm.kernels.triton.aot import recorded_launches, variant
from hashevict_vllm.verify import layer as wrapped
from hashevict_vllm.verify.layer import WrappedLayer

RULES: dict[str, dict[str, Any]] = {
    "vote": {},
    "vote, segments of one": {"segment": 1},
    "vote, whole prompts": {"segment": "prompt"},
    "instant": {"scoring": "instant"},
    "recency": {"name": "streaming_llm"},
    "norm": {"name": "l2_norm"},
    "random": {"name": "random"},
}
PROMPTS = [900, 1, 70, 333, 1200, 64, 65, 17]


class Impl:
    """An inner implementation that attends to nothing."""

    kv_cache_dtype = "auto"
    supports_quant_query_input = False

    def __init__(self, heads: int, dim: int, scale: float, kv_heads: int, *_: Any):
        self.scale, self.num_queries_per_kv = scale, heads // kv_heads

    def forward(self, *_: Any) -> None:
        pass


class Builder(AttentionMetadataBuilder):
    """An inner builder without metadata."""

    def build(self, *_: Any, **__: Any) -> None:
        pass


INNER: Any = SimpleNamespace(get_impl_cls=lambda: Impl, get_builder_cls=lambda: Builder)


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values as slices of one product, as models make them."""
    fused = torch.zeros(count, 8, 32, dtype=torch.bfloat16)
    return fused[:, :4], fused[:, 4:6], fused[:, 6:]


def life(layer: WrappedLayer) -> None:
    """Prompts of all lengths beside decoding, and what a preemption has to replay."""
    chunks = [512, 1, 40, 300, 33, 256, 16, 90]
    for turn in range(60):
        room = 1024 - len(PROMPTS)
        step = []
        for request, prompt in enumerate(PROMPTS):
            start = layer.computed[request]
            size = min(chunks[(turn + request) % 8], prompt - start, room)
            size = size if start < prompt else 1
            room -= max(size - 1, 0)
            step.append(rows(size))
        layer.step(step)
    # After a preemption: prompts, and with them what they had already been answered.
    layer.computed = [0] * len(PROMPTS)
    layer.step([rows(n) for n in (100, 30, 90, 340, 0, 64, 80, 40)])
    for _ in range(12):
        layer.step([rows(1) for _ in PROMPTS])


@pytest.mark.parametrize("rule", RULES)
def test_serving_compiles_nothing_after_the_first_batch(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wrapped, "MAX_TOKENS", 1024)
    monkeypatch.setattr(wrapped, "MAX_MODEL_LEN", 2048)
    options = {"name": "hashevict", "budget": 64, "segment": 32, "recent": 16}
    config = KVPolicyConfig.from_dict({**options, **RULES[rule]})
    policy = config.resolve(2048, 16)
    layer = WrappedLayer(
        *(policy, PROMPTS, 2, 2, 32, 16, torch.bfloat16, True, 0.2), inner=INNER
    )
    with recorded_launches() as first:
        layer.step([rows(2) for _ in PROMPTS])
    warm = {variant(launch) for launch in first}
    layer.computed = [0] * len(PROMPTS)
    with recorded_launches() as later:
        life(layer)
    names = {launch.name for launch in later}
    assert names >= {"plan", "write", "write, no scan"}
    assert (policy.segment == 1) or names >= {"pair", "move"}
    assert not policy.votes or "ballot" in names
    assert {variant(launch) for launch in later} <= warm
