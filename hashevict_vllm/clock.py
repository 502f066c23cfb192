"""Seconds that a worker spends in eviction, where the API server can read them.

The two are processes of one machine, and vLLM's messages between them have no room for
a plugin's numbers: a worker adds to one float64 in a file, which the server maps as
well. Workers of other machines (Ray) do not know the folder, and count for themselves.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

FOLDER = "HASHEVICT_CLOCKS"
"""Environment variable that names the folder; processes inherit it."""


def share() -> None:
    """Make the folder, before vLLM starts processes; its maker deletes it at exit."""
    if FOLDER in os.environ:
        return
    os.environ[FOLDER] = folder = tempfile.mkdtemp(prefix="hashevict-vllm-")
    maker = os.getpid()

    def remove() -> None:
        if os.getpid() == maker:  # not a fork of it
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


def _file(engine: int) -> Path | None:
    folder = os.environ.get(FOLDER)
    return Path(folder, f"engine-{engine}") if folder else None


class Clock:
    """What one worker adds to; nobody else sees it until it is opened."""

    def __init__(self) -> None:
        self._seconds: np.ndarray = np.zeros(1)

    def open(self, engine: int) -> None:
        """Count from zero in the file of an engine.

        Args:
            engine: Its data-parallel index; one worker of it counts.

        """
        path = _file(engine)
        if path is not None and path.parent.is_dir():
            self._seconds = np.memmap(path, np.float64, "w+", shape=(1,))

    def add(self, seconds: float) -> None:
        """Add to it."""
        self._seconds[0] += seconds


def read(engine: int) -> float | None:
    """Seconds that the worker of an engine has counted; None if none does."""
    path = _file(engine)
    if path is None or not path.is_file():
        return None
    return float(np.fromfile(path, np.float64, 1)[0])


EVICTION = Clock()
"""Of this process."""
