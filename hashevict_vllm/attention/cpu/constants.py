"""What the kernels of all layers of a group share, made once at start."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hashevict_vllm.cache.element_map import probe_element_map
from hashevict_vllm.kernels.cpu import launch
from hashevict_vllm.kernels.cpu.openmp import find_openmp
from hashevict_vllm.kernels.projection import make_projection
from hashevict_vllm.policies import make_rule
from hashevict_vllm.policies.vote import estimate_scale
from hashevict_vllm.resolved import ResolvedKVPolicy

logger = logging.getLogger("vllm.hashevict_vllm.attention")

if TYPE_CHECKING:
    from hashevict_vllm.cache.spec import BudgetedAttentionSpec


def rule_array(policy: ResolvedKVPolicy) -> np.ndarray:
    """What kernels know of a rule: int64 [5].

    Sinks, kind of score, seed, pool, vote_every.
    """
    code = make_rule(policy).kernel_code
    numbers = [policy.sinks, code, policy.seed, policy.pool]
    return np.array([*numbers, policy.vote_every], np.int64)


def vote_strengths(policy: ResolvedKVPolicy, scale: float, head_dim: int) -> np.ndarray:
    """What votes are weighed with.

    Returns:
        float32 [5]: factor of what is hashed of a logit, decay, scale, credit, votes
        for values (`kernels.cpu.layer.Rule`).

    """
    factor = estimate_scale(policy.hash_bits, head_dim, policy.orthogonal)
    values = [policy.credit, policy.value_votes]
    return np.array([scale * factor, policy.decay, scale, *values], np.float32)


@dataclass(frozen=True)
class KernelConstants:
    """Arguments of `kernels.cpu.launch` that never change.

    Attributes:
        projection: float32 [D * b], row-major.
        k_map: int32 [N, D], see `probe_element_map`.
        v_map: int32 [N, D].
        rule: int64 [5], see `rule_array`.
        strengths: float32 [5], see `vote_strengths`.
        openmp: int64 [2], see `find_openmp`.

    """

    projection: np.ndarray
    k_map: np.ndarray
    v_map: np.ndarray
    rule: np.ndarray
    strengths: np.ndarray
    openmp: np.ndarray

    @classmethod
    def build(cls, layer: Any, spec: BudgetedAttentionSpec) -> KernelConstants:
        """Probe the page order of the layer's backend and compile the kernels.

        Args:
            layer: An attention layer of the group; its implementation writes the probe.
            spec: The group's spec.

        """
        policy, rule = spec.policy, make_rule(spec.policy)

        def write(
            key: torch.Tensor,
            value: torch.Tensor,
            cache: torch.Tensor,
            slots: torch.Tensor,
        ) -> None:
            layer.impl.do_kv_cache_update(layer, key, value, cache, slots)

        k_map, v_map = probe_element_map(
            write, spec.block_size, spec.head_size, spec.dtype
        )
        projection = make_projection(
            spec.head_size, rule.projected_bits, policy.seed, policy.orthogonal
        )
        logger.info("Loading eviction kernels; a first start compiles them (< 1 min).")
        launch.warm_up(np.dtype(f"u{spec.dtype.itemsize}"))
        return cls(
            projection=projection.numpy().ravel(),
            k_map=k_map.astype(np.int32),
            v_map=v_map.astype(np.int32),
            rule=rule_array(policy),
            strengths=vote_strengths(policy, layer.impl.scale, spec.head_size),
            openmp=find_openmp(),
        )
