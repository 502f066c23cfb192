"""How numba functions are compiled, and where machine code is kept between starts."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numba
from numba import njit

from hashevict_vllm.downloads import cache_dir

logger = logging.getLogger("vllm.hashevict_vllm.kernels")

inlined = njit(inline="always")
"""For parts of hot paths: a call that passes tuples of arrays costs 30 to 60 ns."""


def _sources_digest() -> str:
    """A digest of kernels and policies, whose constants are compiled in.

    numba itself looks at the date of one file.
    """
    digest, package = hashlib.sha256(), Path(__file__).parents[2]
    for folder in ("kernels", "kernels/cpu", "policies"):
        for path in sorted((package / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _cache_root() -> Path:
    """``$NUMBA_CACHE_DIR``, or a folder in this package's cache."""
    named = numba.config.CACHE_DIR
    return Path(named) if named else cache_dir() / "kernels"


def kernel(function: Any) -> Any:
    """Compile an entry point, with numba's disk cache where one can be written.

    The folder's name holds a digest of the sources, so that an upgrade never runs
    machine code of the version before.
    """
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(_cache_root() / _sources_digest())
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba: "no locator available", as on a read-only system
        logger.info("No writable cache for compiled kernels; set NUMBA_CACHE_DIR.")
        return njit(nogil=True)(function)
    finally:
        numba.config.CACHE_DIR = before
