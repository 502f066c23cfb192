"""The repository's Markdown pages, and the code blocks in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import hashevict_vllm

ROOT = Path(hashevict_vllm.__file__).parent.parent
DOCS = ROOT / "docs"

PAGES = (
    *sorted(DOCS.glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "patches" / "README.md",
)

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced code block.

    Attributes:
        page: Where it stands.
        line: Of its fence, from 1.
        language: As the fence says; empty if it does not.
        code: The lines between the fences.

    """

    page: Path
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match[2], match[3])
        for match in FENCE.finditer(text)
    ]


def links(page: Path) -> list[str]:
    """Targets of a page's links, without those of code blocks."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"\]\(([^)\s]+)\)", text)
