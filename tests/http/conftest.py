"""One real server for the tests of this directory.

There is no ``__init__.py`` here: a package named ``http`` in ``sys.path`` would hide
that of the standard library.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from support.pages import ROOT
from support.quickstart import prepared_environment, server_command
from support.server import MODEL, Server, free_port, run, server_env

LOG_LINES_SHOWN = 60


@pytest.fixture(scope="module")
def server(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The quickstart's server, with further options; a pool of 1 GiB.

    SmolLM2-135M-Instruct in bfloat16 with a budget of `BUDGET` tokens.
    """
    port = free_port()
    flags = ["--served-model-name", MODEL, smollm.name, "--max-model-len", "8192"]
    flags += ["--host", "127.0.0.1", "--port", str(port)]
    flags += ["--enable-prompt-tokens-details"]
    environment = prepared_environment(tmp_path_factory.mktemp("environment"))
    env = {**server_env(), "HASHEVICT_VENV": str(environment), "PYTHONPATH": str(ROOT)}
    log_path = tmp_path_factory.mktemp("server") / "log"
    with run([*server_command(), *flags], port, log_path, env) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None]:
    """Show the end of the server's log beside a failure."""
    report = yield
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and server is not None:
        lines = [line for line in server.log().splitlines() if "Route: " not in line]
        report.sections.append(("server log", "\n".join(lines[-LOG_LINES_SHOWN:])))
    return report
