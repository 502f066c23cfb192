"""Sources of a vLLM that need not be importable: installed, or in a wheel."""

from __future__ import annotations

import ast
import functools
import importlib.metadata as metadata
import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path


class Sources:
    """Python sources of one vLLM.

    Attributes:
        version: ``0.32.0``.

    """

    def __init__(self, version: str, read: Callable[[str], str | None]) -> None:
        """Make it from a version and a way to read.

        Args:
            version: ``0.32.0``; a local part such as ``+cpu`` is dropped.
            read: Text of a path that starts with ``vllm/``; None where there is none.

        """
        self.version = version.partition("+")[0]
        self.read = read
        self.tree = functools.cache(self._tree)

    def _tree(self, path: str) -> ast.Module | None:
        text = self.read(path)
        return None if text is None else ast.parse(text)


def installed() -> Sources:
    """The vLLM of this environment, found without importing it.

    Raises:
        ModuleNotFoundError: If there is none.

    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("vLLM is not installed in this environment.")
    root = Path(spec.origin).parent.parent

    def read(path: str) -> str | None:
        file = root / path
        return file.read_text() if file.is_file() else None

    return Sources(metadata.version("vllm"), read)


def wheel(path: Path) -> Sources:
    """The vLLM inside a wheel."""
    archive = zipfile.ZipFile(path)
    names = frozenset(archive.namelist())

    def read(name: str) -> str | None:
        return archive.read(name).decode() if name in names else None

    return Sources(path.name.split("-")[1], read)
