"""A ``vllm serve`` process, its metrics while it works, and vLLM's own client."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 600
STOP_TIMEOUT_S = 30
POLL_S = 0.5

NOT_FOR_SERVERS = (
    # Set for this process alone.
    "VLLM_LOGGING_LEVEL",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    # Beats --kv-cache-memory-bytes (vllm/platforms/cpu.py), which scenarios set.
    "VLLM_CPU_KVCACHE_SPACE",
)
"""Environment variables that a server does not inherit."""


def vllm_command() -> str:
    """The ``vllm`` script of this environment."""
    return str(Path(sys.executable).with_name("vllm"))


class Server:
    """A running server at ``url``."""

    def __init__(self, url: str) -> None:
        self.url = url

    def metrics(self) -> dict[str, float]:
        """VLLM's metrics that have one value, without the prefix ``vllm:``."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found = re.findall(r"^vllm:(\w+){[^}]*} (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    def pool_blocks(self) -> int:
        """Blocks of the KV pool, vLLM's null block included.

        Raises:
            RuntimeError: If vLLM does not say.

        """
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            found = re.search(r'num_gpu_blocks="(\d+)"', answer.read().decode())
        if not found:
            raise RuntimeError("no number of blocks in vLLM's cache_config_info")
        return int(found[1])

    @contextlib.contextmanager
    def watched(self) -> Iterator[dict[str, float]]:
        """Metrics of the block: peaks of use and of requests, preemptions in it.

        The dict is filled when the block ends.
        """
        found: dict[str, float] = {}
        peaks = dict.fromkeys(
            ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting"), 0.0
        )
        before, done = self.metrics(), threading.Event()

        def poll() -> None:
            while not done.wait(POLL_S):
                with contextlib.suppress(OSError):
                    now = self.metrics()
                    for name in peaks:
                        peaks[name] = max(peaks[name], now.get(name, 0.0))

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            done.set()
            thread.join()
        name = "num_preemptions_total"
        found["preemptions"] = self.metrics().get(name, 0) - before.get(name, 0)
        found.update({f"peak_{name}": value for name, value in peaks.items()})


@contextlib.contextmanager
def serve(
    model: Path, flags: Sequence[str], log: Path, variables: Mapping[str, str]
) -> Iterator[Server]:
    """Run ``vllm serve MODEL FLAGS`` on a free port until the block ends.

    Args:
        model: Directory.
        flags: Of ``vllm serve``.
        log: File for its output.
        variables: Of its environment, beside ours.

    Raises:
        RuntimeError: If the server ends at start.
        TimeoutError: If it does not answer in time.

    """
    port = free_port()
    env = {
        key: value for key, value in os.environ.items() if key not in NOT_FOR_SERVERS
    } | dict(variables)
    with run(serve_command(model, flags, port), port, log, env) as url:
        yield Server(url)


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve_command(model: Path, flags: Sequence[str], port: int) -> list[str]:
    """``vllm serve`` on a port of this machine alone."""
    where = ["--host", "127.0.0.1", "--port", str(port)]
    return [vllm_command(), "serve", str(model), *flags, *where]


@contextlib.contextmanager
def run(
    command: Sequence[str], port: int, log: Path, env: Mapping[str, str]
) -> Iterator[str]:
    """Run a command that serves on a port until the block ends; yields its URL.

    Args:
        command: In a process group of its own, which ends with the block.
        port: Where it will answer ``/health``.
        log: File for its output.
        env: All of its environment.

    Raises:
        RuntimeError: If the server ends at start.
        TimeoutError: If it does not answer in time.

    """
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for_health(url, process, log)
        yield url
    finally:
        _stop(process)


def _wait_for_health(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended at start:\n{_end_of(log)}")
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{url}/health", timeout=5),
        ):
            return
        time.sleep(0.5)
    raise TimeoutError(f"no /health after {START_TIMEOUT_S} s:\n{_end_of(log)}")


def _end_of(log: Path) -> str:
    """The last lines of a log, after its name."""
    lines = log.read_text(errors="replace").splitlines()[-60:]
    return "\n".join([f"{log}:", *lines])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end; then kill what is left of its process group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_client(
    server: Server,
    model: Path,
    prompt: int,
    output: int,
    requests: int,
    in_flight: int,
    result: Path,
) -> dict[str, Any]:
    """Load the server with ``vllm bench serve`` on random prompts.

    Args:
        server: The server.
        model: Of the server; its tokenizer makes the prompts.
        prompt: Tokens of every prompt.
        output: Tokens of every answer.
        requests: Number of requests.
        in_flight: Requests at a time.
        result: File for the client's JSON.

    Returns:
        That JSON, with ``itls`` in seconds for every request.

    Raises:
        RuntimeError: If the client fails, or any request does.

    """
    options = {
        "backend": "openai",
        "base-url": server.url,
        "model": str(model),
        "dataset-name": "random",
        "random-input-len": prompt,
        "random-output-len": output,
        "num-prompts": requests,
        "max-concurrency": in_flight,
        "temperature": 0,
        "seed": 0,
        "percentile-metrics": "ttft,itl",
        "metric-percentiles": "50,95,99",
        "result-dir": result.parent,
        "result-filename": result.name,
    }
    command = [vllm_command(), "bench", "serve", "--ignore-eos", "--disable-tqdm"]
    command += ["--save-result", "--save-detailed"]
    command += [
        text for key, value in options.items() for text in (f"--{key}", str(value))
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode or not result.is_file():
        raise RuntimeError(
            f"vllm bench serve failed:\n{(ran.stdout + ran.stderr)[-3000:]}"
        )
    found: dict[str, Any] = json.loads(result.read_text())
    if found["completed"] != requests:
        raise RuntimeError(f"{requests - found['completed']} requests failed")
    return found
