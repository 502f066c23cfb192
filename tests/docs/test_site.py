"""The documentation as a site: complete, without dead links, without third parties."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urldefrag

import pytest
from support.pages import DOCS, PAGES, ROOT, links

from hashevict_vllm.config import KVPolicyConfig

SITE = DOCS / "site" / "mkdocs.yml"
LOADS = {"link": "href", **dict.fromkeys(("script", "img", "iframe"), "src")}
"""Elements that a browser fetches without being asked, and their attribute."""


def build(config: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """``mkdocs build --strict``, which fails at the first warning."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(
        [*command, "--config-file", config, "--site-dir", output],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


class Page(HTMLParser):
    """What a built page links to, loads and can be linked to.

    Attributes:
        links: Targets of its links.
        loads: What it fetches.
        anchors: Its ids.
        styles: Its inline style sheets.

    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors.add(found.get("id") or "")
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        if tag in LOADS and found.get(LOADS[tag]):
            self.loads.append(str(found[LOADS[tag]]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("site")
    built = build(SITE, output)
    assert built.returncode == 0, built.stderr
    return output


@pytest.mark.parametrize("broken", ["[x](nowhere.md)", "[x](flags.md#nowhere)"])
def test_a_dead_link_ends_the_build(broken: str, tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")
    for path in ("CONTRIBUTING.md", "CHANGELOG.md", "patches", "hashevict_vllm"):
        (tmp_path / path).symlink_to(ROOT / path)
    for path in ("docker", "configs"):
        (tmp_path / path).symlink_to(ROOT / path)
    with (tmp_path / "docs" / "faq.md").open("a") as page:
        page.write(f"\n{broken}\n")
    built = build(tmp_path / "docs" / "site" / "mkdocs.yml", tmp_path / "site")
    assert built.returncode != 0
    assert "nowhere" in built.stderr


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.parent != DOCS], ids=lambda page: page.name
)
def test_links_of_pages_outside_of_docs_lead_somewhere(page: Path, site: Path) -> None:
    for link in links(page):
        target, anchor = urldefrag(link)
        if not target or ":" in target:
            continue
        path = (page.parent / target).resolve()
        assert path.exists(), link
        if anchor:
            built = site / path.relative_to(DOCS).with_suffix(".html")
            assert anchor in Page(built).anchors, link


def test_a_browser_is_sent_to_no_third_party(site: Path) -> None:
    pages = [Page(path) for path in site.rglob("*.html")]
    assert len(pages) >= len(PAGES) - 1
    sheets = [path.read_text() for path in site.rglob("*.css")]
    styles = re.findall(r"(?:url\(|@import )['\"]?([^'\")]+)", "\n".join(sheets))
    for loaded in [*(load for page in pages for load in page.loads), *styles]:
        assert not re.match(r"(https?:)?//", loaded), loaded
    # The theme asks GitHub for a repository's stars, and a CDN for diagrams.
    assert not any("data-md-component=source" in page.text for page in pages)
    assert not any('class="mermaid"' in page.text for page in pages)


def test_serving_on_a_gpu_is_three_clicks_away_at_most(site: Path) -> None:
    reached = {"index.html"}
    for _ in range(3):
        links = {link for page in reached for link in Page(site / page).links}
        found = [link for link in links if link.endswith("#on-an-nvidia-gpu")]
        if found:
            break
        reached |= {urldefrag(link)[0] for link in links if ":" not in link}
    page = Page(site / urldefrag(found[0])[0])
    assert "on-an-nvidia-gpu" in page.anchors
    assert "--kv-policy" in page.text
    assert ".[cuda]" in page.text


def test_the_table_of_flags_is_the_codes(site: Path) -> None:
    text = (site / "flags.html").read_text(encoding="utf-8")
    rows = re.findall(r"<tr>\s*<td><code>(\w+)</code></td>", text)
    assert set(KVPolicyConfig.keys()) - {"name", "budget"} <= set(rows)
    assert "--kv-budget" in text
    assert "<!-- table" not in text
