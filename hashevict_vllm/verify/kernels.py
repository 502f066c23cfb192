"""Triton's kernels against the float32 reference, layer by layer of random tokens.

On a GPU, or in the interpreter. Which slots survive must be the same, up to a few where
float32 sums in another order may let two scores change places; what attention returns
must be near.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from hashevict_vllm.attention.xformers import support as xformers_support
from hashevict_vllm.config import KVPolicyConfig
from hashevict_vllm.policies.reference import ReferenceLayer
from hashevict_vllm.verify.checks import UNCHECKED, Check, compared
from hashevict_vllm.verify.layer import MAX_MODEL_LEN, WrappedLayer

RULES: dict[str, dict[str, Any]] = {
    "hashevict (vote)": {"scoring": "vote", "window": 4, "vote_every": 2},
    "hashevict (instant, query)": {"scoring": "instant"},
    "hashevict (instant, key)": {"scoring": "instant", "hash_source": "key"},
    "streaming_llm": {"name": "streaming_llm"},
    "l2_norm": {"name": "l2_norm"},
    "random": {"name": "random"},
}
"""Every rule with a GPU kernel."""

TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of outputs of size 1. Triton multiplies float32 matrices of attention in TF32."""

LEAST_EQUAL = 0.99
"""Share of surviving slots that must be the reference's."""


@dataclass(frozen=True)
class Size:
    """How much is checked.

    Attributes:
        prompts: Lengths of the prompts, read side by side in chunks.
        outputs: Decoded tokens of each.
        heads: KV heads.
        group: Query heads per KV head.
        head_dim: D.
        budget: C.
        dtypes: Of q, k, v and the cache.
        rules: Of `RULES`.

    """

    prompts: tuple[int, ...]
    outputs: int
    heads: int
    group: int
    head_dim: int
    budget: int
    dtypes: tuple[torch.dtype, ...]
    rules: tuple[str, ...]


ON_GPU = Size(
    prompts=(400, 60, 220),
    outputs=24,
    heads=4,
    group=4,
    head_dim=128,
    budget=128,
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
    rules=tuple(RULES),
)
INTERPRETED = Size(
    prompts=(50,),
    outputs=2,
    heads=1,
    group=2,
    head_dim=32,
    budget=36,
    dtypes=(torch.float32,),
    rules=tuple(RULES)[:2],
)


Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""q [T, Hq, D], k and v [T, Hkv, D]."""


def _random_tokens(count: int, size: Size, dtype: torch.dtype) -> Tokens:
    heads = (size.heads * size.group, size.heads, size.heads)
    q, k, v = (torch.randn(count, n, size.head_dim).to(dtype) for n in heads)
    return q, k, v


def _next_chunk(stream: Tokens, start: int, prompt: int) -> Tokens:
    """25 tokens of a prompt or what is left of it; then token by token."""
    end = min(start + 25, prompt) if start < prompt else start + 1
    q, k, v = (x[start:end] for x in stream)
    return q, k, v


def check_rule(
    rule: str, dtype: torch.dtype, size: Size, device: str, backend: str = ""
) -> Check:
    """Feed a layer prompts in chunks, then tokens; compare with the reference.

    Args:
        rule: Of `RULES`.
        dtype: Of q, k, v and the cache.
        size: How much.
        device: Where; ``cpu`` stands for the interpreter.
        backend: What is wrapped, by its name in vLLM's enum; if not given, TRITON_ATTN.

    """
    torch.manual_seed(0)
    options = {"name": "hashevict", "budget": size.budget, "segment": 32, "recent": 8}
    config = KVPolicyConfig.from_dict({**options, "sinks": 5, **RULES[rule]})
    policy = config.resolve(MAX_MODEL_LEN, 16)
    heads, group, dim = size.heads, size.group, size.head_dim
    scale = dim**-0.5
    layer = WrappedLayer(
        *(policy, list(size.prompts), heads, group, dim, 16, dtype, True, scale),
        device=device,
        inner=AttentionBackendEnum[backend or "TRITON_ATTN"].get_class(),
    )
    streams = [_random_tokens(p + size.outputs, size, dtype) for p in size.prompts]
    results: list[list[torch.Tensor]] = [[] for _ in streams]
    while any(
        done < len(k) for done, (_, k, _) in zip(layer.computed, streams, strict=True)
    ):
        chunks = [
            _next_chunk(stream, start, prompt)
            for start, prompt, stream in zip(
                layer.computed, size.prompts, streams, strict=True
            )
        ]
        for request, output in enumerate(layer.step(chunks)):
            results[request].append(output)
    equal = total = 0
    error = 0.0
    for request, (prompt, (q, k, v)) in enumerate(
        zip(size.prompts, streams, strict=True)
    ):
        reference = ReferenceLayer(policy, prompt, heads, dim)
        outputs = [reference.forward(q[:prompt], k[:prompt], v[:prompt], scale)]
        for t in range(prompt, len(k)):
            row = slice(t, t + 1)
            outputs.append(reference.forward(q[row], k[row], v[row], scale))
        kept = layer.positions(request).long()
        expected = reference.slots.position
        for ours, theirs in zip(kept.tolist(), expected.tolist(), strict=True):
            equal += len(set(ours) & set(theirs))
            total += len(theirs)
        # A slot that changed places changes what follows, so the middle counts.
        off = (torch.cat(results[request]).float() - torch.cat(outputs)).abs()
        error = max(error, float(off.amax(dim=(1, 2)).median()))
    right = equal >= LEAST_EQUAL * total and error <= TOLERANCE[dtype]
    name = ", ".join(
        [rule, str(dtype).removeprefix("torch."), *filter(None, [backend])]
    )
    detail = f"{equal} of {total} surviving slots equal; outputs off by {error:.1e}"
    return compared("kernels", name, right, detail)


def run(device: str) -> Iterator[Check]:
    """Check every rule on a device; ``cpu`` stands for the interpreter."""
    size = INTERPRETED if device == "cpu" else ON_GPU
    for rule in size.rules:
        for dtype in size.dtypes:
            yield check_rule(rule, dtype, size, device)
    if device != "cpu":
        yield from _run_xformers(size, device)


def _run_xformers(size: Size, device: str) -> Iterator[Check]:
    """One rule on each operator that xformers has for the dtypes."""
    xformers_support.register()
    for dtype in size.dtypes:
        capability = torch.cuda.get_device_capability()
        reason = xformers_support.unsupported(size.head_dim, dtype, capability)
        if reason is None:
            rule = "hashevict (instant, query)"
            yield check_rule(rule, dtype, size, device, xformers_support.CUSTOM)
        else:
            yield Check("kernels", f"xformers, {dtype}", UNCHECKED, reason)
