"""Checks releases of vLLM against the contract and our diffs, without importing them.

Run by ``scripts/check-vllm [VERSION...]``: fetches each release's wheel from PyPI (a
third of a GB, kept in the cache directory) and reads its sources. With ``--run`` tests
are run on them as well, on a CPU (`support.overlay`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import hashevict_vllm
from hashevict_vllm.downloads import DownloadError, fetch_wheel
from support.contract import ALL_FACTS, Sources, check, imported_names, relevant, wheel
from support.overlay import make_overlay, overlay_env
from support.patched_vllm import PATCHES, apply, patches_of, touched_files

PACKAGE = Path(hashevict_vllm.__file__).parent


def broken_facts(sources: Sources) -> list[str]:
    """A sentence for everything in the contract that the sources contradict."""
    facts = relevant(ALL_FACTS, sources.version) + imported_names(PACKAGE, sources)
    return [sentence for fact in facts if (sentence := check(fact, sources))]


def broken_patches(sources: Sources) -> list[str]:
    """A sentence for every diff of this version that does not apply or compile."""
    patches = patches_of(sources.version)
    if not patches:
        return [f"vLLM {sources.version}: no diffs in patches/ are made for it."]
    sentences = []
    for patch in patches:
        with tempfile.TemporaryDirectory() as folder:
            files = touched_files([patch])
            for name in files:
                target = Path(folder, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(sources.read(name) or "")
            try:
                apply([patch], Path(folder))
                for name in files:
                    compile(Path(folder, name).read_text(), name, "exec")
            except (subprocess.CalledProcessError, SyntaxError) as error:
                said = getattr(error, "stderr", None) or str(error)
                sentences.append(f"vLLM {sources.version}, {patch.name}: {said}")
    return sentences


def run_tests(version: str, arguments: list[str]) -> int:
    """Exit status of pytest on a release's sources."""
    with tempfile.TemporaryDirectory() as folder:
        make_overlay(fetch_wheel(f"vllm=={version}"), Path(folder))
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
            cwd=PACKAGE.parent,
            env=overlay_env(Path(folder)),
            check=False,
        ).returncode


def main() -> None:
    """Command line: exit status 1 if anything is broken."""
    known = sorted(path.name.removeprefix("vllm-") for path in PATCHES.glob("vllm-*"))
    parser = argparse.ArgumentParser(prog="scripts/check-vllm", description=__doc__)
    parser.add_argument(
        "versions",
        nargs="*",
        default=known,
        metavar="VERSION",
        help=f"releases such as 0.33.0 (default: {' '.join(known)})",
    )
    parser.add_argument(
        "--run",
        nargs=argparse.REMAINDER,
        metavar="PYTEST-ARGUMENT",
        help="run these tests on each release's Python code with the installed kernels",
    )
    arguments = parser.parse_args()
    broken, failed = [], False
    for version in arguments.versions:
        try:
            sources = wheel(fetch_wheel(f"vllm=={version}"))
        except DownloadError as error:
            sys.exit(f"hashevict-vllm: {error}")
        found = broken_facts(sources) + broken_patches(sources)
        count = len(relevant(ALL_FACTS, version))
        diffs = len(patches_of(version))
        print(f"vLLM {version}: {count} facts, {diffs} diffs, {len(found)} broken.")
        broken += found
        if arguments.run is not None:
            failed |= run_tests(version, arguments.run) != 0
    print("\n".join(broken), end="\n" if broken else "")
    sys.exit(bool(broken) or failed)


if __name__ == "__main__":
    main()
