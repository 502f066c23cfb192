"""The folders of compiled kernels: one per version, in use, left over, or full.

A process holds a shared lock on the folder that it uses for as long as it lives; who
wants to delete a folder asks for the exclusive one, and leaves it alone if that fails.
A second lock is held while a kernel is saved.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LOCK = ".in-use"
SAVING = ".saving"
KEPT = 3
"""Folders of other versions that are kept: who goes back finds them compiled."""

UNLOCKED_DAYS = 30
"""Age after which a folder without a lock file, of an earlier release, is deleted."""

_held: list[int] = []
"""Descriptors of locks, open until the process ends."""


def claim(folder: Path) -> None:
    """Make a folder, see that it takes bytes, and mark it as used by this process.

    Raises:
        OSError: When it cannot be written, or the disk is full.

    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(1 << 16))
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    with contextlib.suppress(OSError):  # a file system without locks: never deleted
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    _held.append(lock)
    os.utime(folder)


def prune(root: Path, keep: Path) -> None:
    """Delete folders of other versions but for the newest few and those in use.

    Never raises: a folder that cannot be looked at or deleted stays.
    """
    found = []
    with contextlib.suppress(OSError):
        for path in root.iterdir():
            if re.fullmatch(r"[0-9a-f]{12}", path.name) and path != keep:
                found.append((path.stat().st_mtime, path))
    for changed, path in sorted(found, reverse=True)[KEPT:]:
        _delete_unless_used(path, changed)


def _delete_unless_used(path: Path, changed: float) -> None:
    try:
        lock = os.open(path / LOCK, os.O_RDWR)
    except FileNotFoundError:
        if time.time() - changed > UNLOCKED_DAYS * 86_400:
            shutil.rmtree(path, ignore_errors=True)
        return
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass  # another process uses it
    finally:
        os.close(lock)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within this context no other process saves a kernel in the folder."""
    with open(folder / SAVING, "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def guard(compiled: Any, folder: Path, warn: Callable[[str], None]) -> None:
    """Save one kernel at a time, and let one run that was not saved or cannot be read.

    numba names a file by the first number that its index lacks: two processes that save
    at once could take the same, and then one, at its next start, the other's code.

    Args:
        compiled: numba's dispatcher; its private ``_cache`` loads and saves
            (numba/core/caching.py, held by tests/kernels/cpu/test_jit.py).
        folder: The version's, see `claim`.
        warn: Called with the reason.

    """
    cache = compiled._cache
    save, load = cache.save_overload, cache.load_overload

    def save_overload(*args: Any) -> None:
        try:
            with _alone(folder):
                save(*args)
        except OSError as error:
            warn(str(error))

    def load_overload(*args: Any) -> Any:
        try:
            return load(*args)
        except (OSError, EOFError) as error:  # a file that a full disk cut short
            warn(str(error))
            return None

    cache.save_overload, cache.load_overload = save_overload, load_overload
