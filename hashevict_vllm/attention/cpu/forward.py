"""One layer's forward on a CPU: numba's kernels around the stock attention.

The inner implementation's own cache-update op tells where elements of a page lie.
"""

from __future__ import annotations

from time import perf_counter

import torch
from vllm.v1.attention.backend import AttentionLayer

from hashevict_vllm.attention.impl import BudgetedImpl, LayerStep
from hashevict_vllm.cache.page import LayerPages
from hashevict_vllm.kernels.cpu import launch
from hashevict_vllm.kernels.cpu.tokens import addresses, with_whole_rows
from hashevict_vllm.policies import make_rule
from hashevict_vllm.shared import EVICTION_SECONDS


class BudgetedImplMixin(BudgetedImpl):
    """Mixed into the inner implementation."""

    _pages: LayerPages

    def run(self, step: LayerStep) -> None:
        """Write, attend and reduce, round by round."""
        self.bind(step.layer, step.kv_cache)
        pages, constants = self._pages, step.metadata.constants
        # Rows are read by address, so q, k, v must live until the last round is over.
        q, k, v = (with_whole_rows(x) for x in (step.query, step.key, step.value))
        places = addresses(q, k, v)
        common = (
            step.metadata.block_table,
            constants.projection,
            constants.k_map,
            constants.v_map,
            pages.kernel_geometry,
            constants.rule,
            constants.strengths,
            constants.openmp,
        )
        for part in step.metadata.rounds:
            begin = perf_counter()
            launch.write_tokens(
                pages.elements,
                pages.tail,
                places,
                part.token_rows,
                part.positions,
                part.slots,
                part.evict,
                part.recent,
                part.requests,
                *common,
            )
            EVICTION_SECONDS.add(perf_counter() - begin)
            self.attend(step, part.rows, part.inner)
            if len(part.replay):
                begin = perf_counter()
                launch.replay_segments(
                    pages.elements,
                    pages.tail,
                    places,
                    part.replay,
                    *common,
                )
                EVICTION_SECONDS.add(perf_counter() - begin)

    def view_pages(self, layer: AttentionLayer, kv_cache: torch.Tensor) -> LayerPages:
        """Raw views of the layer's pages."""
        rule = make_rule(self.policy)
        return LayerPages(kv_cache, rule.words, rule.projected_bits)
