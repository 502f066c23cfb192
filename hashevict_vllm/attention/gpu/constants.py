"""Buffers and constants on the device, shared by all layers of a KV-cache group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hashevict_vllm.attention.gpu.fork import Fork
from hashevict_vllm.attention.gpu.rule import device_rule, vote_factor
from hashevict_vllm.config import KVPolicyError
from hashevict_vllm.kernels.projection import make_projection
from hashevict_vllm.kernels.triton import ops
from hashevict_vllm.kernels.triton.arguments import Estimate, Scratch, Signed
from hashevict_vllm.kernels.triton.rule import DeviceRule
from hashevict_vllm.plan import most_reduced_slots, most_slots

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from hashevict_vllm.cache.spec import BudgetedAttentionSpec


def _refuse_scales_per_head(layer: Any) -> None:
    """An fp8 checkpoint may bring a scale per head; the kernels take one per layer."""
    if not layer.impl.kv_cache_dtype.startswith("fp8"):
        return
    for name in ("_q_scale", "_k_scale", "_v_scale"):
        if getattr(layer, name).numel() != 1:
            raise KVPolicyError(
                "--kv-cache-dtype: this checkpoint has a scale for every head, and a "
                "KV policy writes slots with one per layer; use bfloat16."
            )


@dataclass(frozen=True)
class DeviceConstants:
    """Made once at start; the buffers keep their addresses, as captured graphs need.

    Attributes:
        rule: What the kernels are compiled for.
        projection: float32 [D, b].
        estimate: How rules that vote guess attention.
        bound: Most slots of any request,
        reduced_bound: and of those that are reduced.
        signatures: int32 [T, Hkv, G + 1, W], of the step; layers use it in turn.
        squares: float32 [T, Hkv, G + 1], likewise.
        scratch: Of ballots, likewise.
        queries: [R, Hq, D], those of a decode step's voters, likewise.
        fork: Where ballots run beside attention.
        last: The last layer of the group: what was forked is joined when it ends.
        pieces: int32 [R, columns], the plan of a decode step.
        live: int32 [R], slots that it attends to.
        done: int32 [R], see `ops.plan`.
        token_piece: int32 [T], see `ops.plan`.
        no_prompt: int32 [R], zeros: in decode every token lies behind its prompt.
        budgets: int32 [R], C of the server, for steps whose requests all have that;
        recents: int32 [R], likewise.

    """

    rule: DeviceRule
    projection: torch.Tensor
    estimate: Estimate
    bound: int
    reduced_bound: int
    signatures: torch.Tensor
    squares: torch.Tensor
    scratch: Scratch
    queries: torch.Tensor
    fork: Fork
    last: Any
    pieces: torch.Tensor
    live: torch.Tensor
    done: torch.Tensor
    token_piece: torch.Tensor
    no_prompt: torch.Tensor
    budgets: torch.Tensor
    recents: torch.Tensor

    @classmethod
    def build(
        cls,
        layer: Any,
        spec: BudgetedAttentionSpec,
        vllm_config: VllmConfig,
        device: torch.device,
        last: Any = None,
    ) -> DeviceConstants:
        """Allocate the buffers.

        Args:
            layer: An attention layer of the group.
            spec: The group's spec.
            vllm_config: Says how many tokens and requests a step may have.
            device: Where the layer's cache lies.
            last: The layer of the group that runs last; if not given, the same.

        Raises:
            KVPolicyError: For a cache that is quantised with a scale per head.

        """
        policy, rule = spec.policy, device_rule(spec.policy)
        _refuse_scales_per_head(layer)
        scheduler = vllm_config.scheduler_config
        tokens = scheduler.max_num_batched_tokens
        # A graph's batch may be padded, but holds no more requests than tokens.
        requests = max(scheduler.max_num_seqs, tokens)
        # In decode, where every one has one token.
        compilation = vllm_config.compilation_config
        asking = max(
            scheduler.max_num_seqs, compilation.max_cudagraph_capture_size or 0
        )
        heads, group = spec.num_kv_heads, layer.impl.num_queries_per_kv
        longest = vllm_config.model_config.max_model_len

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        projection = make_projection(
            spec.head_size, rule.bits, policy.seed, policy.orthogonal
        ).to(device)
        return cls(
            rule=rule,
            projection=projection,
            estimate=Estimate.of(
                projection,
                layer.impl.scale,
                vote_factor(policy, spec.head_size),
                policy.decay,
                policy.credit,
                policy.value_votes,
            ),
            bound=most_slots(policy, longest),
            reduced_bound=most_reduced_slots(policy, longest),
            signatures=ints(tokens, heads, group + 1, rule.hashed),
            squares=torch.zeros(
                (tokens, heads, group + 1), dtype=torch.float32, device=device
            ),
            scratch=Scratch.of(rule, asking * heads, group, spec.head_size, device),
            queries=torch.zeros(
                (asking if rule.votes else 0, heads * group, spec.head_size),
                dtype=vllm_config.model_config.dtype,
                device=device,
            ),
            fork=Fork(device),
            last=layer if last is None else last,
            pieces=ints(requests, ops.NUM_COLUMNS),
            live=ints(requests),
            done=ints(requests),
            token_piece=ints(tokens),
            no_prompt=ints(requests),
            budgets=ints(requests).fill_(policy.budget),
            recents=ints(requests).fill_(policy.recent),
        )

    def signed(self, num_tokens: int) -> Signed:
        """The step's part of ``signatures`` and ``squares``."""
        return Signed(self.signatures[:num_tokens], self.squares[:num_tokens])
