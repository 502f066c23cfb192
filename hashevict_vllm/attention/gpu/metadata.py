"""Builds, once per step, what every budgeted layer of a group will do on a GPU.

A batch in which every request decodes one token is planned on the device, into buffers
that keep their place: the host knows no exact lengths there, and a captured graph must
find the plan of the step where it was. A batch that reads a prompt, be it one token, is
cut on the host (`hashevict_vllm.attention.rounds`), which knows how far prompts have
been read (the scheduler counts), and stays out of graphs: it ends with a reduction,
which no decode graph holds (vllm_patches/decode_graphs.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from hashevict_vllm.attention.gpu.constants import DeviceConstants
from hashevict_vllm.attention.inner import InnerBackend
from hashevict_vllm.attention.lengths import (
    host_lens,
    host_prompt_lens,
    own_budgets,
)
from hashevict_vllm.attention.rounds import Budgets, Pieces, as_rows, cut_step
from hashevict_vllm.kernels.triton import ops
from hashevict_vllm.kernels.triton.pieces import NAMES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from hashevict_vllm.cache.spec import BudgetedAttentionSpec


@dataclass(frozen=True)
class DeviceRound:
    """One attention call: at most one piece of every request.

    Attributes:
        pieces: int32 [P, columns], see `hashevict_vllm.kernels.triton.pieces`.
        token_piece: int32 [T], row of ``pieces`` of every token, -1 for none; None
            where every piece has one token.
        inner: Returns the inner backend's metadata for this call; to be called right
            before it.
        rows: Rows of q, k, v that take part: int64 [n], or a slice; None for all.
        decodes: Whether it was planned on the device: all may evict, none is reduced.
        copies: Whether any token takes the slot that its piece names.
        evicting: int32 [n], tokens that evict; None for none.
        voting: int32 [P', columns], pieces whose tokens vote as they decode, or None.
        reduced: int32 [P', columns], pieces that overflow the budget, or whose segment
            is voted on; None for none.
        longest: Positions, at least of every token of ``reduced``.

    """

    pieces: torch.Tensor
    token_piece: torch.Tensor | None
    inner: Callable[[], Any]
    rows: torch.Tensor | slice | None = None
    decodes: bool = False
    copies: bool = False
    evicting: torch.Tensor | None = None
    voting: torch.Tensor | None = None
    reduced: torch.Tensor | None = None
    longest: int = 0


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


def _always(value: Any) -> Callable[[], Any]:
    return lambda: value


class DeviceMetadataBuilderMixin:
    """Mixed into the inner backend's builder: plans the step, then builds per round."""

    needs: InnerBackend = InnerBackend()
    kv_cache_spec: BudgetedAttentionSpec
    device: torch.device
    supports_update_block_table = False

    decode_graphs_serve_prompts = False
    """Asked by `hashevict_vllm.vllm_patches.decode_graphs`."""

    def __init__(
        self,
        kv_cache_spec: BudgetedAttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        """Build the inner builder, then the buffers."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self._kept_for: tuple[int, dict[int, int]] | None = None
        self._kept: tuple[np.ndarray, torch.Tensor, torch.Tensor]
        layers = vllm_config.compilation_config.static_forward_context
        ordered = [layers[name] for name in layers if name in set(layer_names)]
        self.constants = DeviceConstants.build(
            ordered[0], kv_cache_spec, vllm_config, device, last=ordered[-1]
        )

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: BudgetedAttentionSpec
    ) -> AttentionCGSupport:
        """Full graphs of single-token decodes at most: only these plan on the device.

        Args:
            vllm_config: As the inner builder.
            kv_cache_spec: As the inner builder.

        """
        inner = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        most = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return min(inner, most, key=lambda support: support.value)

    @classmethod
    def get_varlen_cudagraph_max_query_len(
        cls, vllm_config: VllmConfig, kv_cache_spec: BudgetedAttentionSpec
    ) -> int | None:
        """None: no graphs of requests with different numbers of tokens."""
        return None

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
        if common.is_prefilling is None:
            raise RuntimeError("vLLM did not say which requests read prompts.")
        reads = bool(common.is_prefilling.any())  # a tensor of the host
        if common.max_query_len <= 1 and not reads:
            return self._metadata(common, [self._plan_decode(common)])
        prompt_lens = host_prompt_lens(common)
        if prompt_lens is not None and bool(prompt_lens.any()):
            return self._metadata(common, self._plan_chunks(common, prompt_lens))
        if reads:
            raise RuntimeError(
                "vLLM told the host no lengths of the prompts that this step reads."
            )
        # No prompt is without tokens: a batch that vLLM makes up to warm up.
        return self._metadata(common, [self._plan_nothing(common)])

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

    def _inner(
        self, common: CommonAttentionMetadata, fast_build: bool = False, **changes: Any
    ) -> Any:
        """The inner backend's metadata, of a batch with the live slots as lengths."""
        changed = common.replace(
            max_seq_len=min(common.max_seq_len, self.constants.bound),
            # Of the whole batch with absolute lengths; no inner backend asks for them.
            is_prefilling=None,
            positions=None,
            rswa_prefix_lens=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
            **changes,
        )
        return super().build(0, changed, fast_build)  # type: ignore[misc]

    def _plan_decode(self, common: CommonAttentionMetadata) -> DeviceRound:
        """One token of every request, planned on the device from its lengths."""
        constants, num = self.constants, common.num_reqs
        constants.fork.join()  # the step before has read the plan that is made now
        most, budgets, recents = self._budgets(num)
        pieces, live = constants.pieces[:num], constants.live[:num]
        token_piece = constants.token_piece[: common.num_actual_tokens]
        ops.plan(
            common.query_start_loc,
            common.seq_lens[:num],
            constants.no_prompt[:num],
            budgets,
            recents,
            constants.done[:num],
            pieces,
            live,
            token_piece,
            constants.rule,
            True,
            common.slot_mapping,
        )
        upper = common.seq_lens_cpu_upper_bound
        if upper is not None:  # exact, without speculative decoding
            upper = upper[:num].minimum(torch.from_numpy(most).to(upper.dtype))
        inner = self._inner(common, seq_lens=live, seq_lens_cpu_upper_bound=upper)
        return DeviceRound(pieces, token_piece, _always(inner), decodes=True)

    def _budgets(self, num: int) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
        """C of a decode step's requests on the host; it and ``recent`` on the device.

        A batch stays the same for many steps, and so do the tensors.
        """
        constants, own = self.constants, own_budgets()
        if (num, own) != self._kept_for:
            kept = Budgets.of(self.kv_cache_spec.policy, num, own)
            budgets, recents = constants.budgets[:num], constants.recents[:num]
            if own:
                budgets = self._to_device(kept.budget.astype(np.int32))
                recents = self._to_device(kept.recent.astype(np.int32))
            self._kept_for, self._kept = (num, own), (kept.budget, budgets, recents)
        return self._kept

    def _plan_nothing(self, common: CommonAttentionMetadata) -> DeviceRound:
        """Attention alone, over whatever the batch says; nothing is written."""
        pieces = torch.zeros(
            (1, ops.NUM_COLUMNS), dtype=torch.int32, device=self.device
        )
        nobody = torch.full(
            (common.num_actual_tokens,), -1, dtype=torch.int32, device=self.device
        )
        inner = super().build(0, common)  # type: ignore[misc]
        return DeviceRound(pieces, nobody, _always(inner))

    def _plan_chunks(
        self, common: CommonAttentionMetadata, prompt_lens: torch.Tensor
    ) -> list[DeviceRound]:
        """Cut every request's chunk, as `attention.cpu.metadata` does."""
        policy = self.kv_cache_spec.policy
        cut = cut_step(
            policy,
            common.query_start_loc_cpu[: common.num_reqs + 1].numpy(),
            host_lens(common).numpy(),
            prompt_lens.numpy(),
            Budgets.of(policy, common.num_reqs, own_budgets()),
        )
        return [self._round(common, one, alone=len(cut) == 1) for one in cut]

    def _to_device(self, host: np.ndarray) -> torch.Tensor:
        """A small table, copied without waiting for it."""
        tensor = torch.from_numpy(host)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _round(
        self, common: CommonAttentionMetadata, pieces: Pieces, alone: bool
    ) -> DeviceRound:
        """One attention call over pieces that were cut on the host."""
        num, token_rows = common.num_actual_tokens, pieces.token_rows()
        token_piece = np.full(num, -1, np.int32)
        token_piece[token_rows] = pieces.per_token(np.arange(len(pieces.request)))
        rows = as_rows(token_rows, num)
        again = pieces.reduced
        voting = again & (pieces.ballots > 0) & (pieces.first_voter < pieces.count)
        reduced = again & ~voting
        evicting = pieces.row[pieces.evict].astype(np.int32)
        ends = (pieces.start + pieces.count)[reduced]
        live, starts = pieces.live.astype(np.int32), pieces.query_start_loc()
        table = common.block_table_tensor
        if len(live) < common.num_reqs:
            table = table[self._to_device(pieces.request)]
        build = functools.partial(
            self._inner,
            common,
            # Else FlashAttention's schedule lies in a buffer that the rounds share.
            fast_build=not alone,
            query_start_loc=self._to_device(starts),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=self._to_device(live),
            seq_lens_cpu_upper_bound=torch.from_numpy(live),
            num_reqs=len(live),
            num_actual_tokens=len(token_rows),
            max_query_len=int(pieces.count.max()),
            block_table_tensor=table,
            slot_mapping=common.slot_mapping[: len(token_rows)],
        )
        later = self.needs.plans_on_host and not alone
        inner = functools.partial(self._plan_anew, build) if later else _always(build())
        table_of_pieces = pieces.table(NAMES)
        return DeviceRound(
            pieces=self._to_device(table_of_pieces),
            token_piece=self._to_device(token_piece),
            inner=inner,
            rows=self._to_device(rows) if isinstance(rows, np.ndarray) else rows,
            copies=len(evicting) < len(live),
            evicting=self._unless_empty(evicting),
            voting=self._unless_empty(table_of_pieces[voting]),
            reduced=self._unless_empty(table_of_pieces[reduced]),
            longest=int(ends.max(initial=0)),
        )

    def _unless_empty(self, host: np.ndarray) -> torch.Tensor | None:
        """The same on the device; None for no rows."""
        return self._to_device(host) if len(host) else None

    def _plan_anew(self, build: Callable[[], Any]) -> Any:
        """Plan a round over the plan of the one before, once that has been used.

        Slow (it waits for the GPU), and rare: steps that read a prompt across the end
        of a segment, or that replay output after a preemption.
        """
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return build()
