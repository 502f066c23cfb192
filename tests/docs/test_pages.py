"""What the pages say exists: flags, refusals, code, figures."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.pages import DOCS, PAGES, ROOT, Block, blocks
from support.refusals import sentences

from hashevict_vllm.config import KVPolicyConfig

KEYS = KVPolicyConfig.keys()
BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELLS, VALUES = ("bash", "sh"), {"json": json.loads, "yaml": yaml.safe_load}
UNCHECKED = ("", "text", "promql")
"""Output, formulas, queries of Prometheus."""


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_code_blocks_can_be_parsed(block: Block) -> None:
    if block.language in SHELLS:
        subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
    elif block.language == "python":
        ast.parse(block.code)
    elif block.language in VALUES:
        assert VALUES[block.language](block.code)
    else:
        assert block.language in UNCHECKED


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_of_a_policy_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for key in re.findall(r"--kv-policy-config\.(\w+)", text):
        assert key in KEYS
    for block in blocks(page):
        if block.language == "yaml" and "kv-policy:" in block.code:
            options = yaml.safe_load(block.code)
            keys = {"name": options["kv-policy"], "budget": options["kv-budget"]}
            KVPolicyConfig.from_dict({**keys, **options.get("kv-policy-config", {})})


def test_files_that_contributing_names_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w*./-]*\w\.(?:py|md|toml))[:`]", text))
    folders = [ROOT, *(ROOT / name for name in ("hashevict_vllm", "tests"))]
    files = [path for folder in folders[1:] for path in folder.rglob("*.py")]
    names = {path.name for path in files}
    assert len(named) > 50
    for name in named:
        # A name without a folder follows another file of its folder.
        found = any(any(folder.glob(name)) for folder in folders)
        assert found or ("/" not in name and name in names), name


def test_figures_are_those_that_the_code_draws(tmp_path: Path) -> None:
    script = DOCS / "site" / "figures.py"
    subprocess.run([sys.executable, script, "--output", tmp_path], check=True, cwd=ROOT)
    drawn = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    kept = {path.name: path.read_text() for path in (DOCS / "figures").glob("*.svg")}
    assert drawn == kept, "run python docs/site/figures.py"


def test_measured_intervals_are_those_of_the_pages_that_measured_them() -> None:
    sources = [DOCS / f"{name}.md" for name in ("quality", "performance")]
    measured = " ".join(path.read_text(encoding="utf-8") for path in sources)
    number = r"[\d.]+"
    interval = rf"{number}(?: %)? \[{number}, {number}\]"
    quoted = re.findall(interval, (DOCS / "budget.md").read_text())
    assert len(quoted) > 5
    for figure in quoted:
        assert figure in measured, f"docs/budget.md says {figure}: measured anew?"


# -- docs/troubleshooting.md -----------------------------------------------------

REFUSALS = sentences()


def plain(text: str) -> str:
    """Without code marks and line breaks."""
    return " ".join(text.replace("`", "").split())


TROUBLES = plain((DOCS / "troubleshooting.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("place", REFUSALS)
def test_every_refusal_stands_on_the_page(place: str) -> None:
    longest = max(REFUSALS[place], key=len)
    assert plain(longest) in TROUBLES, f"add {longest!r} to docs/troubleshooting.md"


def test_what_dockers_entry_script_refuses_stands_there_too() -> None:
    """Its ``die "…"``: the longest part that does not vary."""
    script = (ROOT / "docker" / "entrypoint.sh").read_text().replace('" \\\n', "")
    found = re.findall(r'^\s+die "(.*)"', re.sub(r' {2,}"', " ", script), re.MULTILINE)
    assert len(found) > 4
    for sentence in found:
        parts = re.split(r"\$\(.*?\)|\$\w+", sentence)
        assert plain(max(parts, key=len)) in TROUBLES, sentence


def test_the_page_has_no_refusal_that_the_code_has_not() -> None:
    """Sections of refusals only; what varies is …, and / stands between two ends."""
    known = plain(" ¦ ".join(part for parts in REFUSALS.values() for part in parts))
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    refused = text.partition("## The environment")[0]
    rows = re.findall(r"^\| (?!Sentence|-)(.*?) \| .*\|$", refused, re.MULTILINE)
    assert len(rows) > 50
    for row in rows:
        _, _, reason = re.sub(r"^(`[^`]*`(, )?)+: ", "¦", row).rpartition("¦")
        for part in re.split(r"…| / ", plain(reason)):
            part = part.strip(" .:;'")
            assert part in known, f"no refusal of the code says {part!r}"
