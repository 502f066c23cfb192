"""Builds, once per step, what every budgeted layer of a group will do on a GPU.

A batch in which every request decodes one token is planned on the device, into buffers
that keep their place: the host knows no exact lengths there, and a captured graph must
find the plan of the step where it was. A batch that reads a prompt is cut on the host,
which does know how far prompts have been read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from hashevict_vllm.attention.gpu_constants import DeviceConstants
from hashevict_vllm.attention.plan import Piece, cut_chunk
from hashevict_vllm.kernels.triton import ops
from hashevict_vllm.kernels.triton.pieces import NAMES
from hashevict_vllm.vllm_patches.model_runner import current_prompt_lens

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from hashevict_vllm.cache.spec import BudgetedAttentionSpec


@dataclass(frozen=True)
class DeviceRound:
    """One attention call: at most one piece of every request.

    Attributes:
        pieces: int32 [P, columns], see `hashevict_vllm.kernels.triton.pieces`.
        token_piece: int32 [T], row of ``pieces`` of every token, -1 for none.
        rows: int64 [n], rows of q, k, v that take part; None for all, in order.
        reduced: int32 [P', columns], those pieces that vote or overflow the budget;
            None if there are none.
        scans: Whether any token may evict, or votes alone.
        inner: The inner backend's metadata for this call.

    """

    pieces: torch.Tensor
    token_piece: torch.Tensor
    rows: torch.Tensor | None
    reduced: torch.Tensor | None
    scans: bool
    inner: Any


@dataclass(frozen=True)
class DeviceMetadata:
    """A step's plan, shared by all layers of a KV-cache group.

    Attributes:
        rounds: In order; the pieces of one request lie in consecutive rounds.
        block_table: int32 [R, max blocks].
        num_actual_tokens: Tokens of the step, as vLLM counts them.
        constants: See there.

    """

    rounds: list[DeviceRound]
    block_table: torch.Tensor
    num_actual_tokens: int
    constants: DeviceConstants


def piece_rows(pieces: Sequence[Piece]) -> list[list[int]]:
    """Pieces as rows of the kernels' table."""
    return [
        [int({**vars(p), "live": p.live_after_write}[name]) for name in NAMES]
        for p in pieces
    ]


def _is_reduced(piece: Piece, budget: int) -> bool:
    """Whether a piece votes, or marks slots, after it was attended to."""
    overflows = piece.slot + piece.count > budget
    return not piece.evict and (overflows or piece.first_voter < piece.count)


class DeviceMetadataBuilderMixin:
    """Mixed into the inner backend's builder: plans the step, then builds per round."""

    kv_cache_spec: BudgetedAttentionSpec
    device: torch.device
    supports_update_block_table = False

    def __init__(
        self,
        kv_cache_spec: BudgetedAttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        """Build the inner builder, then the buffers."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self.constants = DeviceConstants.build(
            layer, kv_cache_spec, vllm_config, device
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DeviceMetadata:
        """Plan one step.

        Args:
            common_prefix_len: Always 0; cascade attention is gone from vLLM.
            common_attn_metadata: vLLM's metadata, with absolute lengths.
            fast_build: As in the base class.

        Raises:
            RuntimeError: If vLLM tells the host neither which requests still read
                their prompt nor, where one does, prompt and request lengths.

        """
        common = common_attn_metadata
        if common.max_query_len <= 1:
            if common.is_prefilling is None:
                raise RuntimeError("vLLM did not say which requests read prompts.")
            if not bool(common.is_prefilling.any()):  # a tensor of the host
                rounds = [self._plan_decode(common)]
                return self._metadata(common, rounds)
        return self._metadata(common, self._plan_chunks(common))

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> DeviceMetadata:
        """A decode step whose kernels a graph captures; every step plans anew."""
        return self._metadata(
            common_attn_metadata, [self._plan_decode(common_attn_metadata)]
        )

    def _metadata(
        self, common: CommonAttentionMetadata, rounds: list[DeviceRound]
    ) -> DeviceMetadata:
        return DeviceMetadata(
            rounds=rounds,
            block_table=common.block_table_tensor,
            num_actual_tokens=common.num_actual_tokens,
            constants=self.constants,
        )

    def _inner(self, common: CommonAttentionMetadata, **changes: Any) -> Any:
        """The inner backend's metadata, of a batch with the live slots as lengths."""
        bound = min(common.max_seq_len, self.constants.bound)
        changed = common.replace(max_seq_len=bound, **changes)
        return super().build(0, changed)  # type: ignore[misc]

    def _plan_decode(self, common: CommonAttentionMetadata) -> DeviceRound:
        """One token of every request, planned on the device from its lengths."""
        constants, num = self.constants, common.num_reqs
        pieces, live = constants.pieces[:num], constants.live[:num]
        token_piece = constants.token_piece[: common.num_actual_tokens]
        ops.plan(
            common.query_start_loc,
            common.seq_lens[:num],
            constants.no_prompt[:num],
            constants.done[:num],
            pieces,
            live,
            token_piece,
            list(constants.rule),
            True,
        )
        upper = common.seq_lens_cpu_upper_bound
        return DeviceRound(
            pieces=pieces,
            token_piece=token_piece,
            rows=None,
            reduced=None,
            scans=True,
            inner=self._inner(
                common,
                seq_lens=live,
                seq_lens_cpu_upper_bound=(
                    None if upper is None else upper.clamp(max=constants.rule.budget)
                ),
            ),
        )

    def _plan_chunks(self, common: CommonAttentionMetadata) -> list[DeviceRound]:
        """Cut every request's chunk, as `hashevict_vllm.attention.metadata` does."""
        lens = common.seq_lens_cpu_upper_bound
        if lens is None and common.seq_lens.device.type == "cpu":
            lens = common.seq_lens
        prompt_lens = current_prompt_lens()
        if prompt_lens is None:
            prompt_lens = common.rswa_prefix_lens
        if lens is None or prompt_lens is None or prompt_lens.device.type != "cpu":
            raise RuntimeError(
                "vLLM told the host no lengths of the prompts that this step reads."
            )
        starts, ends = common.query_start_loc_cpu.tolist(), lens.tolist()
        requests = [
            list(
                cut_chunk(
                    self.kv_cache_spec.policy,
                    request,
                    row=starts[request],
                    start=ends[request] - (starts[request + 1] - starts[request]),
                    end=ends[request],
                    prompt_len=prompt_len,
                )
            )
            for request, prompt_len in enumerate(
                prompt_lens[: common.num_reqs].tolist()
            )
        ]
        return [
            self._round(common, [piece for piece in pieces if piece is not None])
            for pieces in zip_longest(*requests)
        ]

    def _to_device(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        """A small table, copied without waiting for it."""
        host = torch.tensor(values, dtype=dtype, device="cpu")
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    def _round(
        self, common: CommonAttentionMetadata, pieces: list[Piece]
    ) -> DeviceRound:
        """One attention call over pieces that were cut on the host."""
        budget, tokens = self.kv_cache_spec.policy.budget, common.num_actual_tokens
        token_piece = [-1] * tokens
        rows: list[int] = []
        query_start_loc = [0]
        for index, piece in enumerate(pieces):
            span = range(piece.row, piece.row + piece.count)
            token_piece[span.start : span.stop] = [index] * piece.count
            rows += span
            query_start_loc.append(len(rows))
        reduced = [piece for piece in pieces if _is_reduced(piece, budget)]
        live = [piece.live_after_write for piece in pieces]
        every_request = len(pieces) == common.num_reqs
        table = common.block_table_tensor
        if not every_request:
            numbers = [piece.request for piece in pieces]
            table = table[self._to_device(numbers, torch.int64)]
        inner = self._inner(
            common,
            query_start_loc=self._to_device(query_start_loc, torch.int32),
            query_start_loc_cpu=torch.tensor(query_start_loc, dtype=torch.int32),
            seq_lens=self._to_device(live, torch.int32),
            seq_lens_cpu_upper_bound=torch.tensor(live, dtype=torch.int32),
            num_reqs=len(pieces),
            num_actual_tokens=len(rows),
            max_query_len=max(piece.count for piece in pieces),
            block_table_tensor=table,
            slot_mapping=common.slot_mapping[: len(rows)],
        )
        whole = rows == list(range(tokens))
        return DeviceRound(
            pieces=self._to_device(piece_rows(pieces), torch.int32),
            token_piece=self._to_device(token_piece, torch.int32),
            rows=None if whole else self._to_device(rows, torch.int64),
            reduced=(
                self._to_device(piece_rows(reduced), torch.int32) if reduced else None
            ),
            scans=any(piece.count == 1 for piece in pieces),
            inner=inner,
        )
