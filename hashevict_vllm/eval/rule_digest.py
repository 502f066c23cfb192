"""What of the source a policy's results depend on, as a digest.

Results are filed by it, so that those of a rule that was changed since are never mixed
with new ones. A baseline depends on its rule's file: the kernels are held to it by
tests. The default rule is the one that experiments change, often in the kernels first,
so that it depends on those too. Comments, docstrings and line breaks do not count.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]

_RULES = {
    "streaming_llm": "streaming_llm",
    "l2_norm": "l2_norm",
    "key_diff": "key_diff",
    "random": "random",
}
_VOTE = (
    *("policies/base.py", "policies/frame.py", "policies/value.py", "policies/vote.py"),
    *(
        "kernels/*.py",
        "kernels/cpu/*.py",
        "plan.py",
        "attention/*.py",
        "attention/cpu/*.py",
    ),
)


def rule_digest(options: Mapping[str, Any]) -> str | None:
    """Twelve hex digits for a policy's resolved options; None for the full cache."""
    name = options["name"]
    if name == "full":
        return None
    if name == "hashevict" and options["scoring"] == "vote":
        return _digest(_VOTE)
    rule = _RULES.get(name, "hashevict")
    return _digest(("policies/base.py", f"policies/{rule}.py"))


@functools.cache
def _digest(patterns: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(PACKAGE.glob(pattern)):
            digest.update(path.relative_to(PACKAGE).as_posix().encode())
            digest.update(_meaning(path.read_text()).encode())
    return digest.hexdigest()[:12]


def _meaning(source: str) -> str:
    """The syntax tree of a module, without docstrings, as text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not _is_text(each)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
