"""A server of the vLLM that patches/ makes, with no run-time patch in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.patched_vllm import make_copy, python_path
from support.server import MODEL, serve

pytestmark = pytest.mark.http


def test_patched_vllm_serves_with_the_options_and_the_log(
    smollm: Path, tmp_path: Path
) -> None:
    """`tests/vllm_patches/test_patches.py` shows that nothing is patched."""
    (tmp_path / "copy").mkdir()
    env = {"PYTHONPATH": python_path(make_copy(tmp_path / "copy"))}
    flags = ["--kv-policy", "hashevict", "--kv-budget", "512"]
    flags += ["--served-model-name", MODEL, "--enforce-eager"]
    flags += ["--max-model-len", "4096", "--dtype", "float32"]
    with serve(smollm, *flags, log_path=tmp_path / "log", env=env) as patched:
        answer = patched.chat(MODEL, "What is the capital of France?")
        assert "Paris" in answer
        assert "KV budget: 512 tokens per KV head." in patched.log()
