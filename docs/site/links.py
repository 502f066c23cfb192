"""Relative links of Markdown: where they lead in the repository, and in the site."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import PurePosixPath

FENCED = re.compile(r"^(\s*)(```+|~~~+).*?^\s*\2\s*$", re.MULTILINE | re.DOTALL)
"""Code blocks, which hold no links."""

LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
"""``](path#anchor)``; links with a scheme and anchors alone are not matched."""


def targets(markdown: str) -> list[str]:
    """The paths that a page links to, as they are written, without anchors."""
    return [match[2] for match in LINK.finditer(FENCED.sub("", markdown))]


def in_repository(origin: PurePosixPath, target: str) -> PurePosixPath:
    """The place in the repository that a link of a file leads to."""
    return PurePosixPath(posixpath.normpath(origin.parent / target))


def relative(page: PurePosixPath, target: PurePosixPath) -> str:
    """The link from one place of the site to another."""
    return posixpath.relpath(target, page.parent)


def copy_of(path: PurePosixPath) -> str:
    """Where the site holds a copy of a source file; as text, which browsers show."""
    return f"source/{path}.txt"


def rewrite(markdown: str, new_target: Callable[[str], str | None]) -> str:
    """A page with other targets, outside of its code blocks.

    Args:
        markdown: The page.
        new_target: Gives a path's new one; None leaves the link as it is.

    """

    def replaced(match: re.Match[str]) -> str:
        found = new_target(match[2])
        return match[0] if found is None else f"{match[1]}{found}{match[3] or ''})"

    parts, end = [], 0
    for block in FENCED.finditer(markdown):
        parts += [LINK.sub(replaced, markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, LINK.sub(replaced, markdown[end:])])
