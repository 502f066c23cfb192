"""Tests that need Triton's interpreter, which is chosen before Triton is imported.

`tests/kernels/triton/test_triton_kernels.py` runs this folder in a process of its own,
so that the other tests see Triton as it is. By hand: ``TRITON_INTERPRET=1 pytest
tests/interpreted``.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

torch.set_num_threads(1)


def _search_once() -> None:
    """Let Triton look for what a kernel's language has to replace once per launch.

    It looks again at every call of a function from within a kernel, where all is
    replaced already: a quarter of the time.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    stock: Callable[..., None] = interpreter._patch_builtin

    @functools.cache
    def a_builtin(language: Any) -> str:
        members = inspect.getmembers(language)
        return next(name for name, member in members if is_builtin(member))

    def patch_builtin(language: Any, builder: Any, scope: Any) -> None:
        if is_builtin(getattr(language, a_builtin(language))):
            stock(language, builder, scope)

    interpreter._patch_builtin = patch_builtin


if INTERPRETED:
    _search_once()
