"""Every block of docs/quickstart.md, run as it stands there but for the port.

And with ``--dtype float32`` where the page advises it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.pages import ROOT, Block
from support.quickstart import (
    CLIENTS,
    client_command,
    prepared_environment,
    server_command,
)
from support.server import Server, free_port, run, server_env

pytestmark = pytest.mark.http

ANSWERS = ("sky", "6589 -> ", "evicted_tokens_total{")
"""Of what each client prints."""


@pytest.fixture(scope="module")
def server(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """What the first block starts."""
    port = free_port()
    environment = prepared_environment(tmp_path_factory.mktemp("environment"))
    env = {**server_env(), "HASHEVICT_VENV": str(environment), "PYTHONPATH": str(ROOT)}
    log_path = tmp_path_factory.mktemp("quickstart") / "log"
    command = [*server_command(), "--host", "127.0.0.1", "--port", str(port)]
    if "avx512" not in Path("/proc/cpuinfo").read_text():
        command += ["--dtype", "float32"]
    with run(command, port, log_path, env) as running:
        yield running


@pytest.mark.parametrize(
    ("block", "answer"), list(zip(CLIENTS, ANSWERS, strict=True)), ids=str
)
def test_its_clients_get_what_they_ask_for(
    block: Block, answer: str, server: Server
) -> None:
    result = subprocess.run(
        client_command(block, server.url),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert answer in result.stdout, result.stdout
