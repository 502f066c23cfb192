"""Numbers of an engine's processes that its API server shows on ``/metrics``.

They are processes of one machine, and vLLM's messages between them have no room for a
plugin's numbers: each number is a float64 in a file of its own. Workers on other
machines (Ray) do not know the folder; what they count, nobody sees.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

FOLDER = "HASHEVICT_SHARED"
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


class SharedNumber:
    """A number that one process of an engine writes and another reads.

    Args:
        name: Of its file.

    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._value: np.ndarray = np.zeros(1)

    def open(self, engine: int) -> None:
        """Begin with 0 in the file of an engine; nobody sees what is not opened.

        Args:
            engine: Its data-parallel index.

        """
        path = self._file(engine)
        if path is not None and path.parent.is_dir():
            self._value = np.memmap(path, np.float64, "w+", shape=(1,))

    def add(self, more: float) -> None:
        """Add to it."""
        self._value[0] += more

    def read(self, engine: int) -> float | None:
        """Read what a process of an engine has written; None if none has."""
        path = self._file(engine)
        if path is None or not path.is_file():
            return None
        return float(np.fromfile(path, np.float64, 1)[0])

    def _file(self, engine: int) -> Path | None:
        folder = os.environ.get(FOLDER)
        return Path(folder, f"{self._name}-{engine}") if folder else None


EVICTION_SECONDS = SharedNumber("eviction-seconds")
"""Written by one worker of an engine."""

CAPACITY = SharedNumber("capacity")
"""Requests of any length at once; written when the engine has made its pool."""
