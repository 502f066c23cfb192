"""What mkdocs builds that is in no page: the tables of flags, files that pages name.

mkdocs calls the ``on_...`` functions (mkdocs.yml: hooks). Every problem is a warning,
which ends a build with ``--strict``.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import links
import options

# mkdocs counts warnings of its own loggers.
logger = logging.getLogger("mkdocs.hooks.hashevict")

ADOPTED = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "patches/README.md": "patches.md",
}
"""Pages of the site that lie outside of docs/, by their place in the repository."""

TABLE = re.compile(r"^<!-- table: (\w+) -->$", re.MULTILINE)
"""Where a page wants a table of `options.TABLES`."""


def on_files(files: Files, config: Any) -> Files:
    """Add the adopted pages, and copies of the sources that pages link to."""
    root = Path(config.docs_dir).parent
    for path, page in ADOPTED.items():
        files.append(File.generated(config, page, abs_src_path=str(root / path)))
    pages = [file for file in files if file.is_documentation_page()]
    for target in sorted({t for file in pages for t in _sources(file, root)}):
        copy = links.copy_of(target)
        files.append(File.generated(config, copy, abs_src_path=str(root / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in tables; turn links that leave docs/ into links within the site."""
    root = Path(config.docs_dir).parent
    origin, place = _origin(page.file), PurePosixPath(page.file.src_uri)

    def rewritten(target: str) -> str | None:
        found = links.in_repository(origin, target)
        if not (root / found).exists():
            logger.warning("%s: %s does not exist", origin, target)
            return None
        return links.relative(place, _place_in_site(found))

    markdown = TABLE.sub(lambda match: options.TABLES[match[1]](), markdown)
    return links.rewrite(markdown, rewritten)


def _origin(file: File) -> PurePosixPath:
    """Where the page's source lies in the repository."""
    adopted = {page: path for path, page in ADOPTED.items()}
    return PurePosixPath(adopted.get(file.src_uri, f"docs/{file.src_uri}"))


def _place_in_site(path: PurePosixPath) -> PurePosixPath:
    """The site's file for a file of the repository."""
    if str(path) in ADOPTED:
        return PurePosixPath(ADOPTED[str(path)])
    if _is_page_or_image(path):
        return path.relative_to("docs")
    if str(path) == "README.md":
        return PurePosixPath("index.md")
    return PurePosixPath(links.copy_of(path))


def _sources(file: File, root: Path) -> set[PurePosixPath]:
    """Files of the repository, but no pages, that a page links to."""
    origin = _origin(file)
    text = (root / origin).read_text(encoding="utf-8")
    found = {links.in_repository(origin, target) for target in links.targets(text)}
    return {
        path
        for path in found
        if (root / path).is_file()
        and str(path) not in (*ADOPTED, "README.md")
        and not _is_page_or_image(path)
    }


def _is_page_or_image(path: PurePosixPath) -> bool:
    """Whether mkdocs finds a file itself: in docs/, but for docs/site."""
    return path.parts[0] == "docs" and path.parts[1:2] != ("site",)
