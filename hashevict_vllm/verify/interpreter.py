"""The GPU's code on a CPU: Triton's interpreter in the place of a device.

For machines without a GPU. Triton decides at import, from ``TRITON_INTERPRET=1``, so
this is for a process of its own; `allow_triton` comes before vLLM is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock


def allow_triton() -> None:
    """Let vLLM use Triton on a CPU, and with it model runner V2.

    vLLM leaves Triton out there unless Triton has a backend for CPUs
    (vllm/triton_utils/importing.py); the interpreter needs none.

    Raises:
        RuntimeError: If Triton would compile for a device.

    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET=1 must be set before Triton is imported.")
    from triton.backends import Backend, backends

    backends.setdefault("cpu", Backend(compiler=None, driver=SimpleNamespace()))


@contextmanager
def as_on_a_gpu(inner: str = "TRITON_ATTN") -> Iterator[None]:
    """Within this context engines on a CPU are put together as on CUDA.

    vLLM's platform stays the CPU's. What changes is the backend that it selects, and
    what this plugin takes the device for.

    Args:
        inner: The backend, by its name in vLLM's enum.

    """
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from hashevict_vllm import host

    path = AttentionBackendEnum[inner].get_path()
    selected = classmethod(lambda cls, *args, **kwargs: path)
    selector._cached_get_attn_backend.cache_clear()
    with (
        mock.patch.object(CpuPlatform, "get_attn_backend_cls", selected),
        mock.patch.object(host, "on_cpu", return_value=False),
    ):
        yield
    selector._cached_get_attn_backend.cache_clear()
