"""The images' entry script, outside Docker: it serves, is healthy, and drains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from support.containers import ENTRYPOINT, health_command
from support.server import Server, free_port, run, server_env
from support.soak import processes

import hashevict_vllm

pytestmark = pytest.mark.http

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
ROOT = Path(hashevict_vllm.__file__).parent.parent


def container_env(port: int) -> dict[str, str]:
    """What a container's environment has: the commands in PATH, and a port."""
    return {
        **server_env(),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HASHEVICT_PORT": str(port),
    }


def health(port: int) -> int:
    """Exit status of the command that Compose runs in a container."""
    return subprocess.run(
        health_command(), env=container_env(port), timeout=60, check=False
    ).returncode


@pytest.fixture(scope="module")
def server(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The entry script as an image runs it, without a model to serve."""
    log_path = tmp_path_factory.mktemp("entrypoint") / "log"
    port = free_port()
    command = [str(ENTRYPOINT), "--enforce-eager", "--host", "127.0.0.1"]
    command += ["--shutdown-timeout", "60"]
    assert health(port) == 1
    with run(command, port, log_path, container_env(port)) as running:
        yield running


def test_the_entry_script_serves_the_default_model(server: Server) -> None:
    assert "Paris" in server.chat(DEFAULT_MODEL, "What is the capital of France?")


def test_the_health_check_of_compose_finds_it_healthy(server: Server) -> None:
    assert health(int(server.url.rpartition(":")[2])) == 0


def test_a_budget_of_1024_tokens_is_its_default(server: Server) -> None:
    assert "KV budget: 1024 tokens per KV head." in server.log()


def test_sigterm_lets_a_stream_end_and_then_the_server_goes(server: Server) -> None:
    """Stands last: it ends the server."""
    body = {"model": DEFAULT_MODEL, "prompt": "Once upon a time", "max_tokens": 60}
    body |= {"ignore_eos": True, "stream": True, "return_token_ids": True}
    main, *_ = all_of_it = processes(server.url)
    tokens, last = 0, ""
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=body, timeout=60
    ) as stream:
        for line in stream.iter_lines():
            if '"token_ids":[' in line:
                tokens += len(json.loads(line[6:])["choices"][0]["token_ids"])
                if tokens == 5:
                    main.terminate()
            last = line or last
    assert last == "data: [DONE]"
    assert tokens == 60
    _, alive = psutil.wait_procs(all_of_it, timeout=60)
    assert alive == []
