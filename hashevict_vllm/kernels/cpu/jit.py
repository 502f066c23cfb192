"""How numba functions are compiled, and where machine code is kept between starts."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import njit

from hashevict_vllm.downloads import cache_dir
from hashevict_vllm.kernels.cpu import jit_cache

logger = logging.getLogger("vllm.hashevict_vllm.kernels")

inlined = njit(inline="always")
"""For parts of hot paths: a call that passes tuples of arrays costs 30 to 60 ns."""


def _sources_digest() -> str:
    """A digest of the kernels' sources and of the constants compiled into them.

    numba itself looks at the date of one file.
    """
    digest, package = hashlib.sha256(), Path(__file__).parents[2]
    for folder in ("kernels", "kernels/cpu"):
        for path in sorted((package / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _cache_root() -> Path:
    """``$NUMBA_CACHE_DIR``, or a folder in this package's cache.

    Raises:
        DownloadError: Where there is no home directory.

    """
    named = numba.config.CACHE_DIR
    return Path(named) if named else cache_dir() / "kernels"


@functools.cache
def _warn_uncached(reason: str) -> None:
    """Say once per process why the next start will compile again."""
    logger.warning(
        "Compiled kernels are not kept, so every start compiles them (< 1 min): %s. "
        "Name a writable directory in NUMBA_CACHE_DIR.",
        reason,
    )


@functools.cache
def _folder() -> Path | None:
    """Where this version's machine code is kept; None where it cannot be.

    The folder's name holds a digest of the sources, so that an upgrade never runs
    machine code of the version before.
    """
    try:
        folder = _cache_root() / _sources_digest()
        jit_cache.claim(folder)
    except (OSError, RuntimeError) as error:
        _warn_uncached(str(error).rstrip("."))
        return None
    jit_cache.prune(folder.parent, keep=folder)
    return folder


def kernel(function: Callable[..., Any]) -> Any:
    """Compile an entry point, with numba's disk cache where one can be written."""
    folder = _folder()
    if folder is None:
        return njit(nogil=True)(function)
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)
    try:
        compiled = njit(nogil=True, cache=True)(function)
    except RuntimeError as error:  # numba: "no locator available"
        _warn_uncached(str(error))
        return njit(nogil=True)(function)
    finally:
        numba.config.CACHE_DIR = before
    if not Path(compiled.stats.cache_path).is_relative_to(folder):
        # numba fell back to __pycache__ or the user's cache, which an upgrade keeps.
        _warn_uncached(f"numba chose {compiled.stats.cache_path}")
        return njit(nogil=True)(function)
    jit_cache.guard(compiled, folder, _warn_uncached)
    return compiled
