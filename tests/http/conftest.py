"""One real server for the tests of this directory.

There is no ``__init__.py`` here: a package named ``http`` in ``sys.path`` would hide
that of the standard library.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from support.server import BUDGET, KEY, MODEL, Server, serve

LOG_LINES_SHOWN = 60


_servers = contextlib.ExitStack()
"""Ended with this directory's tests: a session goes on, and measures times."""


@pytest.fixture(scope="session")
def server(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """SmolLM2-135M-Instruct with a budget of `BUDGET` tokens and a pool of 1 GiB."""
    flags = ["--kv-policy", "hashevict", "--kv-budget", str(BUDGET)]
    flags += ["--kv-policy-config.inspect", "true", "--api-key", KEY]
    flags += ["--served-model-name", MODEL, "--dtype", "float32"]
    flags += ["--max-model-len", "8192", "--enforce-eager"]
    flags += ["--enable-prompt-tokens-details"]
    flags += ["--kv-policy-config.allow_full", "true"]
    log_path = tmp_path_factory.mktemp("server") / "log"
    return _servers.enter_context(serve(smollm, *flags, log_path=log_path))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path.parent != item.path.parent:
        _servers.close()


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
