"""Whether xformers can serve a machine, and under which name vLLM finds our backend.

vLLM has no backend of that name any more, but a place for one that it does not know:
``CUSTOM`` (vllm/v1/attention/backends/registry.py). Nothing here imports xformers
before it is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CUSTOM = "CUSTOM"
"""What ``--attention-backend`` calls it."""

BACKEND_PATH = "hashevict_vllm.attention.xformers.backend.XformersBackend"

ALIGNMENT = 16
"""Bytes that a head must be a multiple of: operators load as many at once
(xformers/ops/fmha/common.py:check_lastdim_alignment_stride1)."""


def register() -> None:
    """Put `BACKEND_PATH` in the place of CUSTOM, unless another plugin has it."""
    from vllm.v1.attention.backends.registry import (
        AttentionBackendEnum,
        register_backend,
    )

    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)


def registered() -> str | None:
    """The path of the class that CUSTOM stands for; None if nobody registered one."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    custom = AttentionBackendEnum.CUSTOM
    return custom.get_path() if custom.is_overridden() else None


def missing() -> str | None:
    """Why xformers cannot be imported; None if it can."""
    if importlib.util.find_spec("xformers") is not None:
        return None
    return "xformers is not installed (pip install 'hashevict-vllm[xformers]')"


def _objections(
    operator: Any, head_size: int, dtype: torch.dtype, capability: tuple[int, int]
) -> Iterator[str]:
    """Why one operator cannot run; from what it says of itself (fmha/common.py)."""
    newest = operator.CUDA_MAXIMUM_COMPUTE_CAPABILITY
    if not operator.is_available():
        yield "is not in this build"
    if capability < operator.CUDA_MINIMUM_COMPUTE_CAPABILITY:
        yield f"needs capability {operator.CUDA_MINIMUM_COMPUTE_CAPABILITY}"
    elif newest is not None and capability > newest:
        yield f"ends at capability {newest}"
    if dtype not in operator.SUPPORTED_DTYPES:
        yield f"does not take {dtype}"
    elif dtype == torch.bfloat16 and capability < (8, 0):
        yield "takes bfloat16 from capability 8.0 on; use --dtype float16"
    yield from operator.shape_not_supported_reasons(1, 1, head_size, head_size)


def unsupported(
    head_size: int, dtype: torch.dtype, capability: tuple[int, int]
) -> str | None:
    """Why no operator of xformers can serve a model on a GPU; None if one can.

    Asked of those among which ``memory_efficient_attention_forward`` chooses
    (xformers/ops/fmha/dispatch.py:_dispatch_fw_priority_list).

    Args:
        head_size: D.
        dtype: Of q, k and v.
        capability: Of the GPU, major and minor.

    """
    absent = missing()
    if absent is not None:
        return absent
    from xformers.ops.fmha import common, cutlass, flash, flash3

    if head_size * dtype.itemsize % ALIGNMENT:
        return (
            f"heads of {head_size} elements in {dtype} are not a multiple of "
            f"{ALIGNMENT} bytes"
        )
    # Without its extension xformers runs no operator on CUDA, not even torch's own.
    if not common._built_with_cuda:
        return "xformers could not load its extension (see python -m xformers.info)"
    reasons = []
    for operator in (flash3.FwOp, flash.FwOp, cutlass.FwOp):
        objections = list(_objections(operator, head_size, dtype, capability))
        if not objections:
            return None
        reasons.append(f"{operator.NAME} {' and '.join(objections)}")
    return f"xformers has no operator for this: {'; '.join(reasons)}"


def refuse(config: VllmConfig) -> str | None:
    """The sentence for a configuration that names CUSTOM; None if vLLM shall go on.

    Importing xformers starts CUDA, which must not happen in the process that reads the
    flags: whether there is an operator is asked later, in the workers, by vLLM
    (`XformersBackend.supports_combination`).

    Args:
        config: A finished configuration, with a policy, on CUDA.

    """
    dtype, reason = config.cache_config.cache_dtype, missing()
    if dtype.startswith("fp8"):  # other quantised caches are refused before
        return (
            f"--kv-cache-dtype: {dtype} is quantised, which --attention-backend "
            f"{CUSTOM} (xformers) cannot read; use auto."
        )
    if reason is not None:
        return f"--attention-backend: {CUSTOM} cannot be served, as {reason}."
    return None
