"""Patches both model runners: prompts stay out of full decode graphs on request.

A chunk of one prompt token has the shape of a decode, and vLLM replays a decode graph
for it: ``GPUModelRunner._determine_batch_execution_and_padding`` of V1 looks at the
number of tokens alone, ``gather_batch_req_state`` of V2 lets such chunks pass on
purpose ("computes exactly like decodes"). With a budget it does not: the last token of
a prompt, or of a segment, is followed by a reduction, and a decode graph holds none.
Metadata builders say so in ``decode_graphs_serve_prompts = False``; the step then runs
as one that reads prompts does, with piecewise graphs or none.

Upstream fix: patches/*/decode_graphs.patch, that attribute of
``AttentionMetadataBuilder``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def in_vllm() -> bool:
    """Whether vLLM asks metadata builders."""
    from vllm.v1.attention.backend import AttentionMetadataBuilder

    return hasattr(AttentionMetadataBuilder, "decode_graphs_serve_prompts")


def apply() -> None:
    """Patch both runners once per process."""
    if not in_vllm():
        _patch_v1()
        _patch_v2()


def _serve_prompts(groups: Iterable[Any]) -> bool:
    """Whether decode graphs do, for all builders of the attention groups."""
    return all(
        getattr(builder, "decode_graphs_serve_prompts", True)
        for group in groups
        for builder in group.metadata_builders
    )


def _patch_v1() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    stock = GPUModelRunner._determine_batch_execution_and_padding
    if hasattr(stock, "hashevict_stock"):
        return

    def _determine_batch_execution_and_padding(self: Any, **kwargs: Any) -> Any:
        # None for batches of requests; those that vLLM makes up say what they are.
        real = kwargs.get("force_uniform_decode") is None
        if real and not _serve_prompts(self._attn_group_iterator()):
            batch, num_reqs = self.input_batch, kwargs["num_reqs"]
            computed = batch.num_computed_tokens_cpu[:num_reqs]
            if (computed < batch.num_prompt_tokens[:num_reqs]).any():
                kwargs["force_uniform_decode"] = False
        return stock(self, **kwargs)

    _determine_batch_execution_and_padding.hashevict_stock = stock  # type: ignore[attr-defined]
    GPUModelRunner._determine_batch_execution_and_padding = (
        _determine_batch_execution_and_padding
    )


def _patch_v2() -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    stock = GPUModelRunner.gather_batch_req_state
    if hasattr(stock, "hashevict_stock"):
        return

    def gather_batch_req_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        state, uniform_token_count = stock(self, *args, **kwargs)
        if state is None or not state.has_prefill:
            return state, uniform_token_count
        groups = (group for groups in self.attn_groups for group in groups)
        if _serve_prompts(groups):
            return state, uniform_token_count
        return state._replace(decode_graph_eligible=False), None

    gather_batch_req_state.hashevict_stock = stock  # type: ignore[attr-defined]
    GPUModelRunner.gather_batch_req_state = gather_batch_req_state
