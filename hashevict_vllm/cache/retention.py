"""Which positions a live request still holds: read from the tails, between two steps.

Nothing is kept for it. The scheduler knows a request's blocks and how many of its
tokens are written, from which follows how many slots are in use
(`plan.occupied_slots`); what lies in them is in the pages. The engine core handles such
a call between two steps (``EngineCore._handle_client_request``), and a worker after the
steps that it was given before, so that what is read belongs to the state that the
scheduler has counted.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch

from hashevict_vllm.cache.capacity import pool_capacity
from hashevict_vllm.cache.spec import BudgetedAttentionSpec
from hashevict_vllm.kernels.pages import view_pages
from hashevict_vllm.plan import occupied_slots
from hashevict_vllm.policies import make_rule

MAX_SLOTS = 2**22
"""Most slots that one call reads, over all layers and KV heads: 16 MiB of positions."""


class LayerTail(NamedTuple):
    """What one worker holds of a request in one layer, as bytes that any wire carries.

    Attributes:
        layer: Index of the layer in the model.
        heads: KV heads on this worker.
        positions: int32 [heads, n]; ``~position`` where the slot is lost already.
        votes: float32 [heads, n]; None without votes.

    """

    layer: int
    heads: int
    positions: bytes
    votes: bytes | None


def read_retention(
    core: Any, request_id: str, layers: Sequence[int] | None, votes: bool
) -> dict[str, Any] | None:
    """What a request holds now; a method of ``EngineCore``.

    Args:
        core: The engine core.
        request_id: The engine's own id.
        layers: Indices of layers; None for as many, evenly spaced, as `MAX_SLOTS` lets.
        votes: Whether to read votes as well.

    Returns:
        None for an id that the engine does not know (any more); else plain values:
        ``prompt_tokens``, ``tokens`` (written so far), ``budget``, ``live_slots`` (of a
        KV head), ``blocks`` (of one budgeted group), ``layers`` (`LayerTail` each,
        heads of all ranks, as tuples) and ``seconds`` that the engine was busy with it;
        ``refused``, the slots asked for, if they are too many.

    """
    started = time.perf_counter()
    request = core.scheduler.requests.get(request_id)
    if request is None:
        return None
    manager = core.scheduler.kv_cache_manager
    groups = manager.kv_cache_config.kv_cache_groups
    budgeted = [
        number
        for number, group in enumerate(groups)
        if isinstance(group.kv_cache_spec, BudgetedAttentionSpec)
    ]
    single = manager.coordinator.single_type_managers[budgeted[0]]
    policy = single.policy_of(request)
    blocks = manager.get_block_ids(request_id)
    tokens = request.num_computed_tokens
    live = occupied_slots(policy, tokens, request.num_prompt_tokens)
    held = len(blocks[budgeted[0]])
    if not held:
        tokens = live = 0  # waiting, or preempted
    model = core.vllm_config.model_config
    heads = model.get_total_num_kv_heads()
    most = MAX_SLOTS // max(live * heads, 1)
    found = {
        "prompt_tokens": request.num_prompt_tokens,
        "tokens": tokens,
        # A request may keep all, which is no number that means anything.
        "budget": min(policy.budget, model.max_model_len),
        "live_slots": live,
        "blocks": held,
    }
    if layers is None:
        layers = spaced(model.hf_text_config.num_hidden_layers, most)
    elif len(layers) > most:
        return {**found, "refused": len(layers) * live * heads}
    answers = (
        core.collective_rpc(read_tails, args=(tuple(layers), blocks, live, votes))
        if live
        else []
    )
    ranks = core.vllm_config.parallel_config.tensor_parallel_size
    tails = merge(answers, ranks, max(1, ranks // heads))
    if single.shares_blocks(request_id):
        tails = [as_written(tail, live) for tail in tails]
    found["layers"] = [tuple(tail) for tail in tails]
    found["seconds"] = time.perf_counter() - started
    return found


def read_state(core: Any) -> dict[str, Any]:
    """What the engine made of the policy; a method of ``EngineCore``.

    Returns:
        As `worker_state`, of the first worker.

    """
    state: dict[str, Any] = core.collective_rpc(worker_state)[0]
    return state


def spaced(count: int, most: int) -> list[int]:
    """At most ``most`` (but one) of the indices below ``count``, evenly spaced."""
    step = -(-count // max(most, 1))
    return list(range(0, count, max(step, 1)))


def merge(
    answers: Sequence[Sequence[LayerTail]], ranks: int, replicas: int
) -> list[LayerTail]:
    """Layers of all workers, each with the heads of all its ranks.

    Args:
        answers: By worker: pipeline stages in order, in each the ranks of tensor
            parallelism.
        ranks: Tensor-parallel ranks of a stage.
        replicas: Consecutive ranks that hold copies of the same heads.

    """
    merged: dict[int, list[LayerTail]] = {}
    for worker, tails in enumerate(answers):
        if worker % ranks % replicas == 0:
            for tail in tails:
                merged.setdefault(tail.layer, []).append(tail)
    return [
        LayerTail(
            layer,
            sum(tail.heads for tail in parts),
            b"".join(tail.positions for tail in parts),
            b"".join(tail.votes or b"" for tail in parts) or None,
        )
        for layer, parts in sorted(merged.items())
    ]


def as_written(tail: LayerTail, live: int) -> LayerTail:
    """What a request holds that shares its blocks: every token, in its own slot.

    Marks that it finds there are of others, who voted on the same tokens.

    Args:
        tail: As read.
        live: Slots in use.

    """
    positions = np.tile(np.arange(live, dtype=np.int32), tail.heads)
    return tail._replace(positions=positions.tobytes())


# -- in a worker -----------------------------------------------------------------


def worker_state(worker: Any) -> dict[str, Any]:
    """The resolved policy and the capacity, from a worker's pool.

    Returns:
        ``policy`` (`ResolvedKVPolicy`), ``capacity`` (`cache.capacity.Capacity`),
        ``block_size``, ``num_blocks`` without vLLM's null block, ``layers`` (indices of
        the budgeted ones), all as plain values.

    """
    runner = worker.model_runner
    config = runner.kv_cache_config
    layers = sorted((layer for layer, *_ in _budgeted_layers(runner)))
    spec = next(_budgeted_layers(runner))[3]
    found = pool_capacity(runner.vllm_config, config)
    assert found is not None, "a layer is budgeted (cache/coverage.py)"
    return {
        "policy": asdict(spec.policy),
        "capacity": asdict(found),
        "block_size": spec.block_size,
        "num_blocks": config.num_blocks - 1,
        "layers": layers,
    }


def read_tails(
    worker: Any,
    layers: Sequence[int],
    blocks: Sequence[Sequence[int]],
    live: int,
    votes: bool,
) -> list[LayerTail]:
    """Positions (and votes) in a request's first ``live`` slots of some layers.

    Args:
        worker: Of any device.
        layers: Indices; those that lie elsewhere, or have no budget, are left out.
        blocks: Its block ids, by KV-cache group.
        live: Slots in use.
        votes: Whether to read votes, where the rule has any.

    """
    wanted, parts, heads = frozenset(layers), [], []
    for layer, group, kv_cache, spec in _budgeted_layers(worker.model_runner):
        if layer not in wanted:
            continue
        words = make_rule(spec.policy).words
        tail = view_pages(kv_cache, words).tail
        rows = [words - 1, words] if votes and spec.policy.votes else [words]
        ids = torch.tensor(blocks[group], dtype=torch.int64, device="cpu")
        kept = tail.index_select(0, ids.to(tail.device))[:, :, rows]
        # [rows, heads, slots in the order of the block table]
        slots = kept.permute(2, 1, 0, 3).flatten(2)[..., :live]
        heads.append((layer, slots.shape[1], len(rows)))
        parts.append(slots.flatten())
    if not parts:
        return []
    words_of_all = torch.cat(parts).cpu()  # one copy from a device
    return list(_split(words_of_all, heads, live))


def _split(
    words: torch.Tensor, heads: Sequence[tuple[int, int, int]], live: int
) -> Iterator[LayerTail]:
    """Cut int32 words into layers of [rows, heads, live]; votes first, if any."""
    start = 0
    for layer, count, rows in heads:
        size = count * live
        parts = [
            words[start + row * size : start + (row + 1) * size].numpy().tobytes()
            for row in range(rows)
        ]
        start += rows * size
        yield LayerTail(layer, count, parts[-1], parts[0] if rows > 1 else None)


def _budgeted_layers(runner: Any) -> Iterator[tuple[int, int, torch.Tensor, Any]]:
    """Budgeted layers of a model runner: index, group, KV cache and spec."""
    layers = runner.compilation_config.static_forward_context
    for number, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        for name in group.layer_names:
            spec = group.kv_cache_spec if specs is None else specs[name]
            if isinstance(spec, BudgetedAttentionSpec):
                yield layer_index(name), number, layers[name].kv_cache, spec


def layer_index(name: str) -> int:
    """``model.layers.7.self_attn.attn`` is layer 7.

    Raises:
        ValueError: If there is no number in the name.

    """
    number = re.search(r"(?<![^.])\d+(?![^.])", name)
    if number is None:
        raise ValueError(f"no layer number in {name!r}")
    return int(number[0])
