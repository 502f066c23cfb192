"""Every sentence with which the code refuses something, read from its sources.

A sentence is its literal parts: what varies (``{…}`` of an f-string) lies between them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import hashevict_vllm

PACKAGE = Path(hashevict_vllm.__file__).parent

NOT_SERVING = ("bench", "eval", "verify")
"""Folders whose sentences nobody sees who serves a model."""

REASON = {
    "KVPolicyError": 0,
    "VLLMValidationError": 0,
    "ArgumentTypeError": 0,
    "DownloadError": 0,
    "ModelFetchError": 0,
    "fail": 1,
    "_of_model": 1,
}
"""Whose argument is the sentence, or the part after the flag, and which."""


def sentences() -> dict[str, tuple[str, ...]]:
    """Literal parts of every refusal, by ``file:line``."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE)
        if place.parts[0] in NOT_SERVING:
            continue
        for node in _refusals(ast.parse(file.read_text(encoding="utf-8"))):
            parts = tuple(_literals(node))
            if any(part.strip(" :") for part in parts):
                found[f"{place}:{node.lineno}"] = parts
    return found


def _refusals(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            name = getattr(function, "id", getattr(function, "attr", None))
            if name in REASON and len(node.args) > REASON[name]:
                yield node.args[REASON[name]]
        elif isinstance(node, ast.FunctionDef) and _may_refuse(node):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and _is_text(inner.value):
                    assert inner.value is not None
                    yield inner.value
        elif isinstance(node, ast.Assign) and any(
            getattr(target, "id", "").endswith("SENTENCE") for target in node.targets
        ):
            yield node.value


def _may_refuse(function: ast.FunctionDef) -> bool:
    """Rules return the sentence, or None where they have no objection."""
    return function.returns is not None and ast.unparse(function.returns).strip(
        "'\""
    ) == ("str | None")


def _is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _literals(node: ast.expr) -> Iterator[str]:
    """Literal parts of an expression that makes a string, in their order."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        for part in node.values:
            if isinstance(part, ast.Constant):
                yield str(part.value)
    elif isinstance(node, ast.BinOp):
        yield from _literals(node.left)
        yield from _literals(node.right)
    elif isinstance(node, ast.IfExp):
        yield from _literals(node.body)
        yield from _literals(node.orelse)
