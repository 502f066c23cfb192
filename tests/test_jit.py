"""Where machine code of the CPU kernels is kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hashevict_vllm.kernels.cpu import jit


@pytest.mark.parametrize("changed", ["kernels/cpu/scan.py", "policies/vote.py"])
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
