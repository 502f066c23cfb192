"""docker/: the entry script outside Docker with a stand-in for vLLM, and compose.yaml.

tests/http/test_entrypoint.py serves a model with it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.containers import (
    DOCKER,
    DOCKERFILES,
    ENTRYPOINT,
    compose,
    health_command,
    health_command_of,
)

import hashevict_vllm
from hashevict_vllm.health import why_unhealthy

ROOT = Path(hashevict_vllm.__file__).parent.parent


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A directory with a ``vllm`` that prints its arguments, and this ``python3``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "vllm"
    show = "import json, sys\nprint(json.dumps(sys.argv[1:]))\n"
    script.write_text(f"#!{sys.executable}\n{show}")
    script.chmod(0o755)
    python = folder / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return folder


def start(
    commands: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HASHEVICT_")}
    return subprocess.run(
        [ENTRYPOINT, *arguments],
        env={
            **clean,
            "PATH": f"{commands}:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "HASHEVICT_CACHE": str(commands.parent / "cache"),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


DEFAULTS = ["--port", "8000", "--kv-policy", "hashevict", "--kv-budget", "1024"]


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["org/model"], {}, ["org/model", *DEFAULTS]),
        ([], {"HASHEVICT_MODEL": "org/model"}, ["org/model", *DEFAULTS]),
        (
            ["org/model", "--max-model-len", "4096"],
            {"HASHEVICT_MODEL": "org/other", "HASHEVICT_BUDGET": "25%"},
            ["org/model", *DEFAULTS[:-1], "25%", "--max-model-len", "4096"],
        ),
        (
            ["--enforce-eager"],
            {"HASHEVICT_MODEL": "m", "HASHEVICT_POLICY": "full"},
            ["m", "--port", "8000", "--kv-policy", "full", "--enforce-eager"],
        ),
        (
            ["m", "--kv-policy=full"],
            {"HASHEVICT_PORT": "9000"},
            ["m", "--port", "9000", "--kv-policy", "full", "--kv-policy=full"],
        ),
        (
            ["m", "--config", "paper.yaml"],
            {},
            ["m", "--port", "8000", "--config", "paper.yaml"],
        ),
    ],
    ids=["model", "by name", "options win", "full", "full as option", "config file"],
)
def test_arguments_and_environment_become_one_command(
    arguments: list[str],
    environment: dict[str, str],
    expected: list[str],
    commands: Path,
) -> None:
    done = start(commands, *arguments, **environment)
    assert done.stderr == ""
    assert json.loads(done.stdout) == ["serve", *expected]


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]], ids=str)
@pytest.mark.parametrize("named", [False, True], ids=["model in file", "model named"])
def test_a_config_file_keeps_its_model(
    form: list[str], named: bool, commands: Path, tmp_path: Path
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: org/of-the-file\nkv-policy: full\n")
    model = ["org/model"] if named else []
    arguments = [word.format(file) for word in form]
    done = start(commands, *model, *arguments)
    expected = ["serve", *model, "--port", "8000", "--config", str(file)]
    assert json.loads(done.stdout) == expected
    assert ("vLLM reads it as two words" in done.stderr) == (len(form) == 1)


def test_a_port_in_a_config_file_is_refused_unless_the_environment_has_one(
    commands: Path, tmp_path: Path
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 9000\n")
    done = start(commands, "m", "--config", str(file))
    assert done.returncode == 2
    assert done.stderr == (
        f"hashevict-vllm: {file}: port: set HASHEVICT_PORT instead, which the health "
        "check reads too.\n"
    )
    done = start(commands, "m", "--config", str(file), HASHEVICT_PORT="9001")
    assert json.loads(done.stdout)[1:4] == ["m", "--port", "9001"]


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]], ids=str)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: org/of-the-file\nport: 9000\n", []),
        ("model: org/of-the-file\n", ["--port", "8000"]),
    ],
    ids=["port", "no port"],
)
def test_scripts_serve_leaves_model_and_port_to_a_config_file(
    form: list[str], text: str, expected: list[str], commands: Path, tmp_path: Path
) -> None:
    """The script as it is, with its virtual environment stood in for."""
    checkout = tmp_path / "checkout"
    (checkout / "scripts" / "lib").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "serve", checkout / "scripts")
    (checkout / "scripts" / "lib" / "environment.sh").write_text(
        f'VENV={tmp_path}/venv\nsay() {{ echo "$*" >&2; }}\n'
        "prepare_environment() { :; }\ndevice() { echo cpu; }\n"
        "default_model() { echo default; }\n"
    )
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "bin").symlink_to(commands)
    (commands / "python").symlink_to(commands / "python3")
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    arguments = [word.format(file) for word in form]
    done = subprocess.run(
        [checkout / "scripts" / "serve", *arguments],
        env={"PATH": f"{commands}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["serve", *expected, "--config", str(file)]
    assert ("vLLM reads it as two words" in done.stderr) == (len(form) == 1)


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (
            ["m"],
            {"HASHEVICT_PORT": "http"},
            "HASHEVICT_PORT: http is not a port; give a number from 1 to 65535.",
        ),
        (
            ["m"],
            {"HASHEVICT_PORT": "70000"},
            "HASHEVICT_PORT: 70000 is not a port; give a number from 1 to 65535.",
        ),
        (
            ["m", "--port=9000"],
            {},
            "--port: set HASHEVICT_PORT instead, which the health check reads too.",
        ),
        (
            ["/models/gone"],
            {},
            "/models/gone: no such model; mount it into the container, or name one of "
            "the hub.",
        ),
        (
            ["m"],
            {"HASHEVICT_CACHE": "/dev/null/cache"},
            f"HASHEVICT_CACHE: user {os.getuid()} cannot write to /dev/null/cache; "
            "mount a volume of that user's, or name another directory.",
        ),
    ],
    ids=["no number", "no port", "--port", "no model", "no cache"],
)
def test_wrong_settings_end_the_start_with_one_sentence(
    arguments: list[str], environment: dict[str, str], sentence: str, commands: Path
) -> None:
    done = start(commands, *arguments, **environment)
    assert done.returncode == 2
    assert done.stderr == f"hashevict-vllm: {sentence}\n"
    assert done.stdout == ""


def test_a_user_without_a_home_directory_is_told_to_name_one(
    commands: Path, tmp_path: Path
) -> None:
    """As one without an entry in the list of users, and without ``HOME``."""
    nobody = "import pwd\ndef nobody(uid):\n    raise KeyError\npwd.getpwuid = nobody\n"
    (tmp_path / "sitecustomize.py").write_text(nobody)
    python = f'exec env -u HOME -u XDG_CACHE_HOME "{sys.executable}" "$@"'
    (commands / "python3").write_text(f"#!/bin/sh\n{python}\n")
    path = f"{tmp_path}:{ROOT}"
    done = start(commands, "m", PYTHONPATH=path, HASHEVICT_CACHE="")
    assert done.returncode == 2
    assert done.stderr == (
        f"hashevict-vllm: HASHEVICT_CACHE: user {os.getuid()} has no home directory; "
        "name a directory to keep files in.\n"
    )


def test_a_missing_vllm_is_named(commands: Path) -> None:
    (commands / "vllm").unlink()
    done = start(commands, "m")
    assert done.returncode == 2
    assert done.stderr.startswith("hashevict-vllm: vllm: not in PATH;")


# -- compose.yaml ----------------------------------------------------------------


def test_every_image_and_service_asks_for_health_in_the_same_way() -> None:
    commands = [health_command(name) for name in compose()["services"]]
    commands += [health_command_of(dockerfile) for dockerfile in DOCKERFILES]
    assert commands == [["python3", "-m", "hashevict_vllm.health"]] * 4


@pytest.mark.parametrize("service", ["gpu", "cpu"])
def test_services_run_without_privileges_and_write_to_one_volume(service: str) -> None:
    options = compose()["services"][service]
    assert options["user"] == "2000:0"
    assert options["read_only"] is True
    assert options["cap_drop"] == ["ALL"]
    assert options["security_opt"] == ["no-new-privileges:true"]
    assert options["volumes"] == ["cache:/cache"]
    assert options["ports"] == ["${HASHEVICT_PUBLISH:-127.0.0.1:8000}:8000"]


def has_compose() -> bool:
    if shutil.which("docker") is None:
        return False
    version = ["docker", "compose", "version"]
    return not subprocess.run(version, capture_output=True, check=False).returncode


@pytest.mark.skipif(not has_compose(), reason="docker compose is not on this machine")
def test_docker_compose_accepts_the_file() -> None:
    command = ["docker", "compose", "-f", str(DOCKER / "compose.yaml")]
    command += ["--profile", "cpu", "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    services = json.loads(done.stdout)["services"]
    (gpu,) = services["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert gpu["capabilities"] == ["gpu"]
    for service in services.values():
        context, dockerfile = (
            service["build"]["context"],
            service["build"]["dockerfile"],
        )
        assert Path(context, dockerfile) in DOCKERFILES


# -- the health check ------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "reason"), [(200, None), (503, "/health answered 503.")]
)
def test_health_is_what_the_server_answers(status: int, reason: str | None) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            """Keep the test's output clean."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert why_unhealthy(server.server_port) == reason
        thread.join()


def test_nobody_answering_is_unhealthy() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        done = subprocess.run(
            [sys.executable, *health_command()[1:]],
            env={**os.environ, "HASHEVICT_PORT": str(port), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(f"hashevict-vllm: no answer on port {port}: ")
