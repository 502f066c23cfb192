"""A real ``vllm serve``, as a user starts it, and what tests ask of it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import openai

from hashevict_vllm.bench import server as bench
from hashevict_vllm.bench.server import free_port, vllm_command

__all__ = [
    "BUDGET",
    "KEY",
    "MODEL",
    "Server",
    "free_port",
    "run",
    "serve",
    "server_env",
]
__all__ += ["vllm_command"]

BUDGET = 1024
"""``--kv-budget`` of the server that tests/http talks to."""

MODEL = "smollm"
"""Its ``--served-model-name``."""

KEY = "sesame"
"""What `Server.client` sends; servers of tests/http that have an API key have this."""

REQUEST_TIMEOUT_S = 300


class Server(bench.Server):
    """A running server.

    Attributes:
        url: Its root, without ``/v1``.
        log_path: Its stdout and stderr.

    """

    def __init__(self, url: str, log_path: Path) -> None:
        super().__init__(url)
        self.log_path = log_path

    def client(self, timeout: float = REQUEST_TIMEOUT_S) -> openai.OpenAI:
        """The official client; it never retries, so that a test sees every failure."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=timeout
        )

    def chat(self, model: str, question: str, tokens: int = 16) -> str:
        """A greedy answer."""
        with self.client() as client:
            answer = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                max_tokens=tokens,
                temperature=0,
            )
        return answer.choices[0].message.content or ""

    def log(self) -> str:
        """Everything logged so far."""
        return self.log_path.read_text(errors="replace")

    def metric(self, name: str) -> float:
        """Value of one of vLLM's metrics, without the prefix ``vllm:``."""
        return self.metrics()[name]

    def wait_until_idle(self, timeout: float = 60) -> None:
        """Return once no request runs or waits and the whole pool is free."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        deadline = time.monotonic() + timeout
        while any(busy := {name: self.metric(name) for name in names}.values()):
            assert time.monotonic() < deadline, f"still busy after {timeout} s: {busy}"
            time.sleep(0.2)


def server_env() -> dict[str, str]:
    """The environment without what tests/conftest.py sets for in-process engines.

    VLLM's engine waits for its worker in a loop of ``sched_yield``; with
    ``VLLM_USE_SPINLOOP_EXT`` it yields ten times a second. Clients have been left
    without a core beside either.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    ours = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_USE_SPINLOOP_EXT": "1",
    }
    return {**clean, **ours}


@contextlib.contextmanager
def serve(
    model: Path, *flags: str, log_path: Path, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run ``vllm serve MODEL FLAGS`` on a free port until the block ends."""
    port = free_port()
    command = bench.serve_command(model, flags, port)
    with run(command, port, log_path, {**server_env(), **(env or {})}) as server:
        yield server


@contextlib.contextmanager
def run(
    command: Sequence[str], port: int, log_path: Path, env: Mapping[str, str]
) -> Iterator[Server]:
    """Run a command that serves on a port until the block ends."""
    with bench.run(command, port, log_path, env) as url:
        yield Server(url, log_path)
