"""What a metadata builder may know of its batch beyond what vLLM hands it.

The patches of the model runners put it here (`vllm_patches.model_runner`,
`request_args`), for the time in which a step's metadata are built.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Rows = Mapping[int, Mapping[str, Any]]

NOBODY: Rows = {}
PROMPT_LENS: ContextVar[torch.Tensor | None] = ContextVar("prompt_lens", default=None)
EXTRA_ARGS: ContextVar[Rows] = ContextVar("extra_args", default=NOBODY)


def current_prompt_lens() -> torch.Tensor | None:
    """Prompt lengths of the batch whose metadata is being built: int [max_num_reqs]."""
    return PROMPT_LENS.get()


def passes_extra_args() -> bool:
    """Whether vLLM's model runners pass ``extra_args`` on (patches/*/request_args)."""
    from vllm.v1.attention import backend

    return hasattr(backend, "batch_extra_args")


def current_extra_args() -> Rows:
    """``SamplingParams.extra_args`` of the batch whose metadata are being built.

    Returns:
        By row; requests without any are left out.

    """
    if passes_extra_args():
        from vllm.v1.attention import backend

        rows: Rows = backend.batch_extra_args.get()
        return rows
    return EXTRA_ARGS.get()
