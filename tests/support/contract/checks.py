"""A statement about vLLM's sources, and how it is checked."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .sources import Sources


@dataclass(frozen=True)
class Fact:
    """One thing that we rely on.

    Attributes:
        at: ``vllm/file.py``, or ``vllm/file.py:Class.method`` for a part of it.
        why: Who relies on it: ends the sentence that is printed when it fails.
        takes: The exact parameters, where it is a function.
        says: Fragments of its code in this order, written as `ast.unparse` does:
            one line, single quotes, no comments.
        has: Names that it binds: attributes, methods, module globals.
        only: Versions it is about, such as ``0.33``; all if not given.

    """

    at: str
    why: str
    takes: tuple[str, ...] | None = None
    says: tuple[str, ...] = ()
    has: tuple[str, ...] = ()
    only: str = ""


def relevant(facts: Iterable[Fact], version: str) -> list[Fact]:
    """The facts that are about a version."""
    return [
        fact
        for fact in facts
        if not fact.only or f"{version}.".startswith(f"{fact.only}.")
    ]


def check(fact: Fact, sources: Sources) -> str | None:
    """One readable sentence if the sources contradict the fact, else None."""
    path, _, name = fact.at.partition(":")
    tree = sources.tree(path)
    if tree is None:
        return _sentence(fact, sources, "the file is gone")
    node = _find(tree, name)
    if node is None:
        return _sentence(fact, sources, "it is gone")
    objections = (_takes(fact, node), _says(fact, node), _has(fact, node, sources))
    for objection in objections:
        if objection:
            return _sentence(fact, sources, objection)
    return None


def _sentence(fact: Fact, sources: Sources, what: str) -> str:
    return f"vLLM {sources.version}, {fact.at}: {what}; {fact.why}."


def _takes(fact: Fact, node: ast.AST) -> str | None:
    if fact.takes is None:
        return None
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return "it is no longer a function"
    found = tuple(_parameters(node.args))
    if found == fact.takes:
        return None
    return f"takes ({', '.join(found)}) instead of ({', '.join(fact.takes)})"


def _parameters(args: ast.arguments) -> Iterator[str]:
    yield from (arg.arg for arg in (*args.posonlyargs, *args.args))
    if args.vararg:
        yield f"*{args.vararg.arg}"
    yield from (arg.arg for arg in args.kwonlyargs)
    if args.kwarg:
        yield f"**{args.kwarg.arg}"


def _says(fact: Fact, node: ast.AST) -> str | None:
    text = ast.unparse(node)
    at = 0
    for fragment in fact.says:
        at = text.find(fragment, at)
        if at < 0:
            return f"no longer says `{fragment}` (in this order)"
        at += len(fragment)
    return None


def _has(fact: Fact, node: ast.AST, sources: Sources) -> str | None:
    bound = set(bound_names(node))
    if node is sources.tree(fact.at):
        bound.update(_star_imported(fact.at, node, sources))
    missing = [name for name in fact.has if name not in bound]
    return f"no longer has {', '.join(missing)}" if missing else None


def _star_imported(path: str, module: ast.AST, sources: Sources) -> Iterator[str]:
    """Names that a package takes over with ``from .module import *``."""
    folder = path.rpartition("/")[0]
    for node in getattr(module, "body", ()):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            assert node.level == 1, f"{path}: only imports from the package itself"
            tree = sources.tree(f"{folder}/{node.module}.py")
            yield from () if tree is None else bound_names(tree)


def _find(tree: ast.Module, name: str) -> ast.AST | None:
    """The definition at a dotted name; the module itself for an empty one."""
    node: ast.AST | None = tree
    for part in filter(None, name.split(".")):
        found = [child for bound, child in _bindings(node) if bound == part]
        node = found[-1] if found else None
    return node


def bound_names(node: ast.AST) -> Iterator[str]:
    """Names bound in a module or class, also under ``if`` and ``try``."""
    return (name for name, _ in _bindings(node))


def _bindings(node: Any) -> Iterator[tuple[str, ast.AST]]:
    for child in getattr(node, "body", ()):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name, child
        elif isinstance(child, ast.Import | ast.ImportFrom):
            for alias in child.names:
                yield alias.asname or alias.name.partition(".")[0], child
        elif isinstance(child, ast.AnnAssign | ast.Assign):
            for name in _targets(child):
                yield name, child
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from _bindings(child)
            yield from _bindings(ast.Module(getattr(child, "orelse", []), []))
            for handler in getattr(child, "handlers", ()):
                yield from _bindings(handler)
    if isinstance(node, ast.ClassDef):
        yield from _set_on_self(node)


def _set_on_self(node: ast.ClassDef) -> Iterator[tuple[str, ast.AST]]:
    """Attributes that methods set."""
    for child in ast.walk(node):
        if isinstance(child, ast.AnnAssign | ast.Assign):
            for name in _targets(child):
                if name.startswith("self."):
                    yield name.removeprefix("self."), child


def _targets(node: ast.AnnAssign | ast.Assign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [ast.unparse(target) for target in targets]
