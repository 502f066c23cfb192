"""Where machine code of the CPU kernels is kept."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest
from numba.core import cgutils
from numba.np.arrayobj import populate_array

import hashevict_vllm
from hashevict_vllm.kernels.cpu import jit, jit_cache


@pytest.mark.parametrize("changed", ["kernels/cpu/scan.py", "kernels/codes.py"])
def test_changed_sources_are_compiled_anew(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = jit._sources_digest()
    package = tmp_path / "package"
    shutil.copytree(Path(jit.__file__).parents[2], package)
    monkeypatch.setattr(jit, "__file__", str(package / "kernels" / "cpu" / "jit.py"))
    assert jit._sources_digest() == before
    with (package / changed).open("a") as file:
        file.write("# another version\n")
    assert jit._sources_digest() != before


# -- a cache that cannot be written ----------------------------------------------

KERNEL = """
import logging, sys
logging.basicConfig(format="LOG %(message)s", stream=sys.stdout)
{before}
from hashevict_vllm.kernels.cpu import jit

path = sys.argv[1] + "/module.py"
open(path, "w").write("def double(x):\\n    return x + x\\n")
sys.path.insert(0, sys.argv[1])
import module
first, second = jit.kernel(module.double), jit.kernel(module.double)
print("RESULT", first(2), second(3), first.stats.cache_path)
"""
LONG_PAST = 1_000_000_000
FULL = """
import tempfile
from numba.core import caching
def full(self, *args):
    raise OSError(28, "No space left on device")
caching.IndexDataCacheFile.save = full
"""
ASKED = """
import fcntl, os, pathlib
from numba.core import caching
save = caching.IndexDataCacheFile.save
def ask_and_save(self, *args):
    (path,) = pathlib.Path(os.environ["HASHEVICT_CACHE"]).rglob(".saving")
    with open(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.warning("it is being saved")
    save(self, *args)
caching.IndexDataCacheFile.save = ask_and_save
"""
NOBODY = """
import os, pwd
def nobody(uid):
    raise KeyError(uid)
pwd.getpwuid = nobody
for name in ("HOME", "XDG_CACHE_HOME", "HASHEVICT_CACHE"):
    os.environ.pop(name, None)
"""


def run_kernel(work: Path, before: str = "", **env: str) -> tuple[list[str], list[str]]:
    """Logged lines and the result of compiling a kernel twice, in its own process."""
    done = subprocess.run(
        [sys.executable, "-c", KERNEL.format(before=before), str(work)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    (result,) = (line.split()[1:] for line in lines if line.startswith("RESULT"))
    return [line for line in lines if line.startswith("LOG")], result


@pytest.mark.parametrize("case", ["no home", "unwritable", "full"])
def test_kernels_run_uncached_with_one_warning(case: str, tmp_path: Path) -> None:
    """Beside a writable source file, whose __pycache__ numba would take."""
    (tmp_path / "file").write_text("no folder")
    env, before = {"NUMBA_CACHE_DIR": ""}, ""
    if case == "no home":
        before = NOBODY
    elif case == "unwritable":
        env["HASHEVICT_CACHE"] = str(tmp_path / "file" / "cache")
    else:
        env["HASHEVICT_CACHE"], before = str(tmp_path / "cache"), FULL
    logged, result = run_kernel(tmp_path, before, **env)
    assert result[:2] == ["4", "6"]
    assert len(logged) == 1, logged
    assert "Compiled kernels are not kept" in logged[0]
    assert not list(tmp_path.rglob("*.nbi"))


def test_a_cache_that_can_be_written_is_used_without_a_word(tmp_path: Path) -> None:
    env = {"NUMBA_CACHE_DIR": "", "HASHEVICT_CACHE": str(tmp_path / "cache")}
    logged, result = run_kernel(tmp_path, **env)
    assert logged == []
    assert result[2].startswith(str(tmp_path / "cache" / "kernels"))
    assert list(tmp_path.rglob("*.nbi"))


def test_of_several_processes_one_saves_at_a_time(tmp_path: Path) -> None:
    env = {"NUMBA_CACHE_DIR": "", "HASHEVICT_CACHE": str(tmp_path / "cache")}
    logged, _ = run_kernel(tmp_path, ASKED, **env)
    assert logged == ["LOG it is being saved"]
    assert list(tmp_path.rglob("*.nbc"))


def test_numba_choosing_another_place_is_not_followed(tmp_path: Path) -> None:
    env = {"NUMBA_CACHE_DIR": "", "HASHEVICT_CACHE": str(tmp_path / "cache")}
    env["NUMBA_CACHE_LOCATOR_CLASSES"] = "InTreeCacheLocator"
    logged, result = run_kernel(tmp_path, **env)
    assert "numba chose" in logged[0]
    assert result == ["4", "6", "None"]


# -- left-over folders -----------------------------------------------------------


def version(root: Path, number: int, locked: bool = True) -> Path:
    """A folder of compiled kernels, the older the smaller its number."""
    folder = root / f"{number:012x}"
    folder.mkdir()
    (folder / "kernel.nbc").write_bytes(b"machine code")
    if locked:
        (folder / jit_cache.LOCK).touch()
    os.utime(folder, (LONG_PAST + number, LONG_PAST + number))
    return folder


def test_old_versions_are_deleted_but_for_the_newest_and_those_in_use(
    tmp_path: Path,
) -> None:
    old = [version(tmp_path, number) for number in range(8)]
    (tmp_path / "notes").mkdir()
    hold = (
        "import sys; from pathlib import Path;"
        "from hashevict_vllm.kernels.cpu import jit_cache;"
        f"lock = open(Path(sys.argv[1]) / {jit_cache.LOCK!r});"
        "import fcntl; fcntl.flock(lock, fcntl.LOCK_SH); print('held', flush=True);"
        "sys.stdin.read()"
    )
    user = subprocess.Popen(
        [sys.executable, "-c", hold, str(old[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert user.stdout is not None
    assert user.stdout.readline() == "held\n"
    own = tmp_path / ("f" * 12)
    jit_cache.claim(own)
    jit_cache.prune(tmp_path, keep=own)
    left = {path.name for path in tmp_path.iterdir()}
    kept = {path.name for path in old[-jit_cache.KEPT :]}
    assert left == {"notes", own.name, old[1].name} | kept
    user.communicate("")
    jit_cache.prune(tmp_path, keep=own)
    assert not old[1].exists()


def test_a_folder_without_a_lock_is_deleted_only_when_it_is_old(tmp_path: Path) -> None:
    old = [version(tmp_path, number, locked=False) for number in range(5)]
    os.utime(old[1])  # now the newest
    jit_cache.prune(tmp_path, keep=tmp_path / "none")
    assert [path.exists() for path in old] == [False, True, False, True, True]


# -- numba's private parts -------------------------------------------------------


def test_numba_is_of_the_pinned_version_and_as_we_rely_on() -> None:
    text = Path(hashevict_vllm.__file__).parent.with_name("pyproject.toml").read_text()
    (low, high) = re.findall(r'"numba>=([\d.]+),<([\d.]+)"', text)[0]
    installed = tuple(map(int, numba.__version__.split(".")[:2]))
    assert tuple(map(int, low.split("."))) <= installed
    assert installed < tuple(map(int, high.split(".")))

    @numba.njit
    def function(x: int) -> int:
        return x

    cache = function._cache
    assert callable(cache.save_overload)
    assert callable(cache.load_overload)
    assert hasattr(function.stats, "cache_path")
    assert list(inspect.signature(populate_array).parameters) == [
        *("array", "data", "shape", "strides", "itemsize", "meminfo", "parent"),
    ]
    for name in (
        *("alloca_once", "alloca_once_value", "for_range", "for_range_slice"),
        *("gep_inbounds", "get_or_insert_function"),
    ):
        assert hasattr(cgutils, name)
