"""A platform that vLLM takes for another one, and what is refused there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

from hashevict_vllm.compat import rules
from hashevict_vllm.config import KVPolicyError


def platform(name: str) -> Any:
    """As much of vLLM's ``current_platform`` as the checks ask: cpu, cuda or others."""
    return SimpleNamespace(
        is_cpu=lambda: name == "cpu", is_cuda=lambda: name == "cuda", device_name=name
    )


def refusal(config: Any, device: str = "cuda") -> str | None:
    """The sentence of `rules.check` on a platform, None if it starts."""
    with mock.patch("vllm.platforms.current_platform", platform(device)):
        try:
            rules.check(config)
        except KVPolicyError as error:
            text = str(error)
            assert text.endswith(".")
            assert text.count(". ") == 0
            return text
    return None
