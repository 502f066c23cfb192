"""A real ``vllm serve``, as a user starts it, in a process group of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import openai

BUDGET = 1024
"""``--kv-budget`` of the server that tests/http talks to."""

MODEL = "smollm"
"""Its ``--served-model-name``."""

START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 30
REQUEST_TIMEOUT_S = 300


class Server:
    """A running server.

    Attributes:
        url: Its root, without ``/v1``.
        log_path: Its stdout and stderr.

    """

    def __init__(self, url: str, log_path: Path) -> None:
        self.url = url
        self.log_path = log_path

    def client(self, timeout: float = REQUEST_TIMEOUT_S) -> openai.OpenAI:
        """The official client; it never retries, so that a test sees every failure."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=timeout
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
        text = httpx.get(f"{self.url}/metrics", timeout=REQUEST_TIMEOUT_S).text
        match = re.search(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE)
        assert match, f"no metric vllm:{name}"
        return float(match[1])

    def wait_until_idle(self, timeout: float = 60) -> None:
        """Return once no request runs or waits and the whole pool is free."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        deadline = time.monotonic() + timeout
        while any(busy := {name: self.metric(name) for name in names}.values()):
            assert time.monotonic() < deadline, f"still busy after {timeout} s: {busy}"
            time.sleep(0.2)


def vllm_command() -> str:
    """The ``vllm`` script of this environment."""
    return str(Path(sys.executable).with_name("vllm"))


def server_env() -> dict[str, str]:
    """The environment without what tests/conftest.py sets for in-process engines."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    return {**clean, "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serve(
    model: Path, *flags: str, log_path: Path, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run ``vllm serve MODEL FLAGS`` on a free port until the block ends."""
    port = free_port()
    command = [vllm_command(), "serve", str(model), *flags]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with run(command, port, log_path, {**server_env(), **(env or {})}) as server:
        yield server


@contextlib.contextmanager
def run(
    command: Sequence[str], port: int, log_path: Path, env: Mapping[str, str]
) -> Iterator[Server]:
    """Run a command that serves on a port until the block ends."""
    server = Server(f"http://127.0.0.1:{port}", log_path)
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for_health(server, process)
        yield server
    finally:
        _stop(process)


def _wait_for_health(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"The server ended at start:\n{server.log()}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health").is_success:
                return
        time.sleep(0.5)
    raise TimeoutError(f"no /health after {START_TIMEOUT_S} s:\n{server.log()}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end; then kill what is left of its process group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
