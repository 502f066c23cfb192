"""Builds, once per step, what every budgeted layer of a group will do in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from hashevict_vllm.attention.cpu.constants import KernelConstants
from hashevict_vllm.attention.lengths import (
    first_layer,
    host_lens,
    host_prompt_lens,
    own_budgets,
)
from hashevict_vllm.attention.rounds import Budgets, Pieces, as_rows, cut_step
from hashevict_vllm.shared import EVICTION_SECONDS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from hashevict_vllm.cache.spec import BudgetedAttentionSpec


@dataclass(frozen=True)
class Round:
    """One attention call: at most one piece of every request.

    Attributes:
        rows: Rows of q, k, v that take part: int64 [n], or a slice; None for all.
        token_rows: int32 [n], the same rows for the kernels.
        positions: int32 [n], absolute positions.
        slots: int32 [n], slot to append to, or the number of live slots if evicting.
        evict: bool [n].
        recent: int32 [n], the most recent tokens that are protected.
        requests: int32 [n], rows of the block table.
        replay: int32 [m, 10], pieces that vote or whose segment overflows the budget,
            as `kernels.cpu.launch.replay_segments` takes them.
        inner: The inner backend's metadata for this call.

    """

    rows: torch.Tensor | slice | None
    token_rows: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    evict: np.ndarray
    recent: np.ndarray
    requests: np.ndarray
    replay: np.ndarray
    inner: Any


@dataclass(frozen=True)
class BudgetedMetadata:
    """A step's plan, shared by all layers of a KV-cache group.

    Attributes:
        rounds: In order; the pieces of one request lie in consecutive rounds.
        block_table: int32 [R, max blocks].
        num_actual_tokens: Tokens of the step, without padding.
        constants: What the kernels of all the group's layers share.

    """

    rounds: list[Round]
    block_table: np.ndarray
    num_actual_tokens: int
    constants: KernelConstants


REPLAYED = (
    *("request", "start", "count", "row", "slot", "budget", "recent"),
    *("compact", "first_voter", "ballots"),
)
"""Columns of `Round.replay`."""


def round_arrays(pieces: Pieces) -> dict[str, np.ndarray]:
    """Token-wise and piece-wise arrays of one round, as `Round` holds them."""
    return {
        "token_rows": pieces.token_rows().astype(np.int32),
        "positions": pieces.tokens(pieces.start).astype(np.int32),
        "slots": pieces.tokens(pieces.slot).astype(np.int32),
        "evict": pieces.per_token(pieces.evict),
        "recent": pieces.per_token(pieces.recent).astype(np.int32),
        "requests": pieces.per_token(pieces.request).astype(np.int32),
        "replay": pieces.table(REPLAYED)[pieces.reduced],
    }


class BudgetedMetadataBuilderMixin:
    """Mixed into the inner backend's builder: plans the step, then builds per round."""

    kv_cache_spec: BudgetedAttentionSpec
    supports_update_block_table = False

    def __init__(
        self,
        kv_cache_spec: BudgetedAttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        """Build the inner builder, then all that no request should wait for."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        layer = first_layer(vllm_config, layer_names)
        self.constants = KernelConstants.build(layer, kv_cache_spec)
        if vllm_config.parallel_config.rank == 0:
            EVICTION_SECONDS.open(vllm_config.parallel_config.data_parallel_index)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> BudgetedMetadata:
        """Plan one step.

        Args:
            common_prefix_len: Always 0; cascade attention is gone from vLLM.
            common_attn_metadata: vLLM's metadata, with absolute lengths.
            fast_build: As in the base class.

        Raises:
            RuntimeError: If vLLM does not say how long the prompts are.

        """
        common = common_attn_metadata
        prompt_lens = host_prompt_lens(common)
        if prompt_lens is None:
            raise RuntimeError(
                "vLLM passed no prompt lengths to the attention metadata builder."
            )
        policy = self.kv_cache_spec.policy
        cut = cut_step(
            policy,
            common.query_start_loc_cpu.numpy(),
            host_lens(common).numpy(),
            prompt_lens.numpy(),
            Budgets.of(policy, common.num_reqs, own_budgets()),
        )
        return BudgetedMetadata(
            rounds=[self._build_round(common, pieces) for pieces in cut],
            block_table=common.block_table_tensor.numpy(),
            num_actual_tokens=common.num_actual_tokens,
            constants=self.constants,
        )

    def _build_round(self, common: CommonAttentionMetadata, pieces: Pieces) -> Round:
        """The inner metadata of one attention call over the pieces."""
        token_rows = pieces.token_rows()
        rows = as_rows(token_rows, common.num_actual_tokens)
        live = torch.from_numpy(pieces.live.astype(np.int32))
        changes = {"seq_lens": live, "max_seq_len": int(live.max())}
        if rows is not None or len(live) < common.num_reqs:
            starts = torch.from_numpy(pieces.query_start_loc())
            table = common.block_table_tensor
            changes |= {
                "query_start_loc": starts,
                "query_start_loc_cpu": starts,
                "num_reqs": len(live),
                "num_actual_tokens": len(token_rows),
                "max_query_len": int(pieces.count.max()),
                "block_table_tensor": table[torch.from_numpy(pieces.request)],
                "slot_mapping": common.slot_mapping[: len(token_rows)],
            }
        return Round(
            rows=torch.from_numpy(rows) if isinstance(rows, np.ndarray) else rows,
            inner=super().build(0, common.replace(**changes)),  # type: ignore[misc]
            **round_arrays(pieces),
        )
