"""Every PromQL expression of docker/helm: dashboard, alerts, scaler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

HELM = Path(__file__).parent.parent.parent / "docker" / "helm"
DASHBOARD, ALERTS = HELM / "files" / "dashboard.json", HELM / "files" / "alerts.yaml"

VARIABLES = {"$__rate_interval": "1m", "$model": ".*", "$instance": ".*"}
"""What Grafana puts in their place."""


def panels() -> dict[str, list[str]]:
    """Expressions by the title of their panel, variables put in."""
    found: dict[str, list[str]] = {}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        texts = [target["expr"] for target in panel["targets"]]
        for name, value in VARIABLES.items():
            texts = [text.replace(name, value) for text in texts]
        found[panel["title"]] = texts
    return found


def alerts() -> list[dict[str, Any]]:
    """The rules of alerts.yaml."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[str]:
    """All of them."""
    return [e for found in panels().values() for e in found] + [
        rule["expr"] for rule in alerts()
    ]
