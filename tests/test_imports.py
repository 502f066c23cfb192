"""Who may import whom (``[tool.importlinter]`` in pyproject.toml)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")
ROOT = Path(__file__).parents[1]


def lint(root: Path) -> str:
    """What import-linter says of a copy of the package; nothing is imported."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    env = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"}
    ran = subprocess.run(
        command, cwd=root, env=env, capture_output=True, text=True, check=False
    )
    assert ("BROKEN" in ran.stdout) == (ran.returncode != 0), ran.stdout + ran.stderr
    assert "Contracts: " in ran.stdout, ran.stdout + ran.stderr
    return ran.stdout


def test_the_package_keeps_its_import_rules() -> None:
    found = lint(ROOT)
    assert "0 broken" in found, found


@pytest.mark.parametrize(
    ("rule", "file", "line"),
    [
        ("know no vLLM", "policies/random.py", "import vllm"),
        ("know no vLLM", "config.py", "import vllm.config"),
        ("know no vLLM", "kernels/codes.py", "import hashevict_vllm.cache.page"),
        ("know no vLLM", "plan.py", "from vllm.logger import init_logger"),
        ("know no vLLM", "reuse.py", "from hashevict_vllm import host"),
        ("know no vLLM", "request_budget.py", "from hashevict_vllm import batch"),
        (
            "Attention on one device",
            "attention/xformers/impl.py",
            "from hashevict_vllm.attention.gpu import constants",
        ),
        (
            "Kernels of one device",
            "kernels/cpu/frame.py",
            "from hashevict_vllm.kernels.triton import frame",
        ),
        (
            "No circles",
            "cache/page.py",
            "if False:\n    from hashevict_vllm.cache import spec",
        ),
        (
            "No circles",
            "kernels/codes.py",
            "from hashevict_vllm.policies import frame",
        ),
    ],
)
def test_a_rule_fails_when_an_import_breaks_it(
    rule: str, file: str, line: str, tmp_path: Path
) -> None:
    """In a copy: import-linter reads sources without running them."""
    shutil.copytree(
        ROOT / "hashevict_vllm",
        tmp_path / "hashevict_vllm",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    broken = tmp_path / "hashevict_vllm" / file
    broken.write_text(f"{broken.read_text()}\n{line}\n")
    said = [text for text in lint(tmp_path).splitlines() if " BROKEN" in text]
    assert any(rule in text for text in said), said
