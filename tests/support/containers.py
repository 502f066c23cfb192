"""What docker/ says, read by the tests."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

DOCKER = Path(__file__).parent.parent.parent / "docker"
ENTRYPOINT = DOCKER / "entrypoint.sh"
DOCKERFILES = (DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu")


def compose() -> dict[str, Any]:
    """The content of compose.yaml, with variables as they are written."""
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def health_command(service: str = "cpu") -> list[str]:
    """The command with which Compose asks whether a container is healthy."""
    kind, *command = compose()["services"][service]["healthcheck"]["test"]
    assert kind == "CMD"
    return command


def health_command_of(dockerfile: Path) -> list[str]:
    """The same in a Dockerfile."""
    found = re.search(r"^HEALTHCHECK .*\\\n +CMD (.*)$", dockerfile.read_text(), re.M)
    assert found
    return json.loads(found[1])
