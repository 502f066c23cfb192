"""Every name that hashevict-vllm imports from vLLM must be there to import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from .checks import Fact
from .sources import Sources


def imported_names(package: Path, sources: Sources) -> list[Fact]:
    """A fact per (module of vLLM, importing file) of a package.

    Args:
        package: Directory of ``hashevict_vllm``.
        sources: Tells modules from packages.

    """
    facts = []
    for file in sorted(package.rglob("*.py")):
        for module, names in _imports(file):
            path = module.replace(".", "/")
            where = f"{path}.py"
            if sources.read(where) is None:
                where = f"{path}/__init__.py"
            names = tuple(n for n in names if not _is_module(f"{path}/{n}", sources))
            user = f"{package.name}/{file.relative_to(package)} imports it"
            facts.append(Fact(where, user, has=names))
    return facts


def _is_module(path: str, sources: Sources) -> bool:
    return any(sources.read(path + end) is not None for end in (".py", "/__init__.py"))


def _imports(file: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module.split(".")[0] == "vllm":
                yield node.module, tuple(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vllm":
                    yield alias.name, ()
