"""Patches `vllm.triton_utils.dispatcher`: numba may be imported before a worker starts.

Where: the name ``vars`` in the module that ``_rebind_kernels`` scans all modules with.
It expects ``vars(value)`` to be a dict; llvmlite's ``ffi.lib`` answers any attribute,
``__dict__`` included, with a C function, so ``import numba`` before the worker starts
(a second engine in one process, a script that uses numba) ends it with an
`AttributeError`. Why then: the scan runs in ``init_worker``, before a model is loaded.

Upstream fix: patches/*/kernel_dispatcher.patch, ``_instance_dict``.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import Any


def _vars(value: Any) -> Mapping[str, Any]:
    """``vars(value)``, or nothing where that is not a mapping."""
    namespace = builtins.vars(value)
    return namespace if isinstance(namespace, Mapping) else {}


def in_vllm() -> bool:
    """Whether vLLM's scan survives such values."""
    from vllm.triton_utils import dispatcher

    return hasattr(dispatcher, "_instance_dict")


def apply() -> None:
    """Patch once per process."""
    from vllm.triton_utils import dispatcher

    if not in_vllm():
        dispatcher.vars = _vars
