"""The diffs in patches/: they apply, and replace the run-time patches."""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
from support.engine import engine, greedy
from support.models import random_prompt
from support.patched_vllm import (
    PATCHES,
    make_copy,
    patches_of,
    python_path,
)

from hashevict_vllm import plugin, vllm_patches
from hashevict_vllm.vllm_patches import PATCHES as RUN_TIME_PATCHES
from hashevict_vllm.vllm_patches import in_vllm, request_stats

POLICY = {"budget": 201, "segment": 64}
# Every one begins as the one before, so that prefix caching has work to do.
PROMPTS = [random_prompt(length, seed=3) for length in (20, 333, 700, 700)]
BUDGETS = (None, 96, None, 177)
TOKENS = 100


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vLLM with the diffs applied."""
    return make_copy(tmp_path_factory.mktemp("patched"))


def run(copy: Path, code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Python with the copy as its vLLM."""
    return subprocess.run(
        [sys.executable, *code.split()],
        env={**os.environ, "PYTHONPATH": python_path(copy)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        **options,
    )


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0"])
def test_every_run_time_patch_has_an_upstream_diff(version: str) -> None:
    assert {patch.stem for patch in patches_of(version)} == set(RUN_TIME_PATCHES)


@pytest.mark.parametrize("patch", sorted(PATCHES.glob("*/*.patch")), ids=str)
def test_diffs_carry_one_line_of_context(patch: Path) -> None:
    """We give away our own lines, and of vLLM's only what places them."""
    hunks = re.split(r"^@@ .* @@\n", patch.read_text(), flags=re.MULTILINE)[1:]
    for hunk in hunks:
        lines = [line for line in hunk.splitlines() if line[:3] not in ("---", "+++")]
        changed = [i for i, line in enumerate(lines) if line[:1] in "+-"]
        assert changed[0] <= 1
        assert len(lines) - 1 - changed[-1] <= 1


def test_stock_vllm_is_patched_at_run_time() -> None:
    assert in_vllm() == dict.fromkeys(RUN_TIME_PATCHES, False)


@pytest.mark.parametrize("name", RUN_TIME_PATCHES)
def test_every_function_that_wraps_one_of_vllms_is_in_its_place(name: str) -> None:
    """Of two patches of one method neither may take the other's mark for its own.

    What wraps ``stock`` is made in `apply` and kept by what it was put into alone.
    """
    plugin.register()
    request_stats._note_progress()  # which the first logger does
    module = importlib.import_module(f"{vllm_patches.__name__}.{name}")
    gc.unfreeze()  # what is frozen is not listed
    alive = {f.__code__ for f in gc.get_objects() if isinstance(f, FunctionType)}
    makers = [f for f in vars(module).values() if isinstance(f, FunctionType)]
    wrappers = [
        code
        for maker in makers
        for code in maker.__code__.co_consts
        if isinstance(code, CodeType) and "stock" in code.co_freevars
    ]
    assert [code for code in wrappers if code not in alive] == []


def test_patched_vllm_generates_the_same_tokens_without_run_time_patches(
    copy: Path, llama: Path
) -> None:
    job = {"model": str(llama), "policy": POLICY, "prompts": PROMPTS, "tokens": TOKENS}
    job |= {"budgets": BUDGETS, "options": {"enable_prefix_caching": True}}
    done = run(copy, "-m support.patched_vllm", input=json.dumps(job))
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["vllm"] == str(copy / "vllm")
    assert answer["in_vllm"] == dict.fromkeys(RUN_TIME_PATCHES, True)
    with engine(llama, POLICY) as llm:
        assert answer["tokens"] == greedy(llm, PROMPTS, TOKENS, BUDGETS)


def test_patched_vllm_keeps_prompts_out_of_decode_graphs_itself(copy: Path) -> None:
    tests = Path(__file__).with_name("test_decode_graphs.py")
    done = run(copy, f"-m pytest -q -p no:cacheprovider {tests}")
    assert done.returncode == 0, done.stdout[-4000:]
