"""Builds, once per step, what every budgeted layer of a group will do in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from hashevict_vllm.attention.cpu.constants import KernelConstants
from hashevict_vllm.attention.cpu.decode import decode_arrays
from hashevict_vllm.attention.plan import Piece, cut_chunk
from hashevict_vllm.vllm_patches.model_runner import current_prompt_lens

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from hashevict_vllm.cache.spec import BudgetedAttentionSpec


@dataclass(frozen=True)
class Round:
    """One attention call: at most one piece of every request.

    Attributes:
        rows: int64 [n], rows of q, k, v that take part; None for all, in order.
        span: The rows as a slice, where they are consecutive.
        token_rows: int32 [n], the same rows for the kernels.
        positions: int32 [n], absolute positions.
        slots: int32 [n], slot to append to, or the number of live slots if evicting.
        evict: bool [n].
        requests: int32 [n], rows of the block table.
        replay: int32 [m, 8], pieces that vote or whose segment overflows the budget,
            as `kernels.cpu.launch.replay_segments` takes them.
        inner: The inner backend's metadata for this call.

    """

    rows: torch.Tensor | None
    span: slice | None
    token_rows: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    evict: np.ndarray
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


def _round_arrays(pieces: Sequence[Piece], budget: int) -> dict[str, np.ndarray]:
    """Token-wise and piece-wise arrays of one round."""
    counts = np.array([piece.count for piece in pieces])
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)

    def per_token(values: list[int]) -> np.ndarray:
        return np.repeat(np.array(values, np.int32), counts)

    replay = [
        (
            *(p.request, p.start, p.count, p.row, p.slot),
            *(p.compact, p.first_voter, p.ballots),
        )
        for p in pieces
        if p.first_voter < p.count or (not p.evict and p.slot + p.count > budget)
    ]
    return {
        "token_rows": (per_token([p.row for p in pieces]) + within).astype(np.int32),
        "positions": (per_token([p.start for p in pieces]) + within).astype(np.int32),
        "slots": (per_token([p.slot for p in pieces]) + within).astype(np.int32),
        "evict": np.repeat(np.array([p.evict for p in pieces]), counts),
        "requests": per_token([p.request for p in pieces]),
        "replay": np.array(replay, np.int32).reshape(-1, 8),
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
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self.constants = KernelConstants.build(layer, kv_cache_spec)

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
        prompt_lens = common.rswa_prefix_lens
        if prompt_lens is None:
            prompt_lens = current_prompt_lens()
        if prompt_lens is None:
            raise RuntimeError(
                "vLLM passed no prompt lengths to the attention metadata builder."
            )
        prompt_lens = prompt_lens[: common.num_reqs]
        rounds = self._build_decode(common, prompt_lens)
        if rounds is None:
            rounds = self._build_rounds(common, prompt_lens)
        return BudgetedMetadata(
            rounds=rounds,
            block_table=common.block_table_tensor.numpy(),
            num_actual_tokens=common.num_actual_tokens,
            constants=self.constants,
        )

    def _build_decode(
        self, common: CommonAttentionMetadata, prompt_lens: torch.Tensor
    ) -> list[Round] | None:
        """The one round of a step where every request decodes one token; else None."""
        if common.max_query_len != 1 or common.num_actual_tokens != common.num_reqs:
            return None
        ends = common.seq_lens[: common.num_reqs].numpy()
        if (ends <= prompt_lens.numpy()).any():
            return None
        policy = self.kv_cache_spec.policy
        seq_lens = np.minimum(ends, policy.budget).astype(np.int32)
        inner = super().build(  # type: ignore[misc]
            0,
            common.replace(
                seq_lens=torch.from_numpy(seq_lens),
                max_seq_len=int(seq_lens.max()),
                slot_mapping=common.slot_mapping[: common.num_reqs],
            ),
        )
        arrays = decode_arrays(policy, ends - 1)
        span = slice(0, common.num_reqs)
        return [Round(rows=None, span=span, inner=inner, **arrays)]

    def _build_rounds(
        self, common: CommonAttentionMetadata, prompt_lens: torch.Tensor
    ) -> list[Round]:
        """The rounds of any step, piece by piece."""
        policy = self.kv_cache_spec.policy
        starts = common.query_start_loc_cpu.tolist()
        ends = common.seq_lens.tolist()
        requests = [
            list(
                cut_chunk(
                    policy,
                    request,
                    row=starts[request],
                    start=ends[request] - (starts[request + 1] - starts[request]),
                    end=ends[request],
                    prompt_len=prompt_len,
                )
            )
            for request, prompt_len in enumerate(prompt_lens.tolist())
        ]
        by_round = [
            [piece for piece in pieces if piece is not None]
            for pieces in zip_longest(*requests)
        ]
        return [self._build_round(common, pieces) for pieces in by_round]

    def _build_round(
        self, common: CommonAttentionMetadata, pieces: list[Piece]
    ) -> Round:
        """The inner metadata of one attention call over the pieces."""
        arrays = _round_arrays(pieces, self.kv_cache_spec.policy.budget)
        rows = torch.from_numpy(arrays["token_rows"].astype(np.int64))
        counts = torch.tensor([piece.count for piece in pieces], dtype=torch.int32)
        query_start_loc = torch.zeros(len(pieces) + 1, dtype=torch.int32)
        torch.cumsum(counts, 0, out=query_start_loc[1:])
        seq_lens = torch.tensor(
            [piece.live_after_write for piece in pieces], dtype=torch.int32
        )
        requests = torch.tensor([piece.request for piece in pieces])
        every_request = len(pieces) == common.num_reqs
        table = common.block_table_tensor
        inner = super().build(  # type: ignore[misc]
            0,
            common.replace(
                query_start_loc=query_start_loc,
                query_start_loc_cpu=query_start_loc,
                seq_lens=seq_lens,
                num_reqs=len(pieces),
                num_actual_tokens=len(rows),
                max_query_len=int(counts.max()),
                max_seq_len=int(seq_lens.max()),
                block_table_tensor=table if every_request else table[requests],
                slot_mapping=common.slot_mapping[: len(rows)],
            ),
        )
        first, last = int(rows[0]), int(rows[-1])
        consecutive = last - first + 1 == len(rows)
        whole = consecutive and len(rows) == common.num_actual_tokens
        return Round(
            rows=None if whole else rows,
            span=slice(first, last + 1) if consecutive else None,
            inner=inner,
            **arrays,
        )
