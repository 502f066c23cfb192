"""Metadata of the xformers backend: the calls of a step, shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from hashevict_vllm.attention.lengths import first_layer, host_lens
from hashevict_vllm.attention.xformers.calls import Call, plan_calls

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec


@dataclass(frozen=True)
class XformersMetadata(AttentionMetadata):
    """The calls of one attention, in the order of their rows."""

    calls: list[Call]


class XformersMetadataBuilder(AttentionMetadataBuilder[XformersMetadata]):
    """Makes biases from the lengths that the host knows.

    A captured graph could not follow them, so attention stays out of graphs.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        """Take the sizes that a step's calls depend on."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layer = first_layer(vllm_config, layer_names)
        self._group = layer.impl.num_queries_per_kv

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> XformersMetadata:
        """The calls of one batch.

        Args:
            common_prefix_len: Always 0, as in the base class.
            common_attn_metadata: vLLM's metadata, with live slots as lengths.
            fast_build: As in the base class.

        Raises:
            RuntimeError: If the host does not know the lengths.

        """
        common = common_attn_metadata
        return XformersMetadata(
            plan_calls(
                common.query_start_loc_cpu[: common.num_reqs + 1].tolist(),
                host_lens(common).tolist(),
                common.block_table_tensor,
                self.kv_cache_spec.block_size,
                self._group,
            )
        )
