"""A real Prometheus that scrapes one server and evaluates our alerts."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import yaml

from hashevict_vllm.bench.server import free_port
from support.monitoring import ALERTS

SCRAPE_S = 2
START_TIMEOUT_S = 30


@contextlib.contextmanager
def prometheus(target: str, folder: Path, pace: float) -> Iterator[str]:
    """Run Prometheus until the block ends; yields its URL.

    Args:
        target: Host and port that it scrapes every `SCRAPE_S` seconds.
        folder: For its data and configuration.
        pace: Factor on the alerts' times, to see them fire without waiting.

    Raises:
        RuntimeError: If it does not start.

    """
    (folder / "alerts.yaml").write_text(yaml.safe_dump(paced_rules(pace)))
    config = {
        "global": {
            "scrape_interval": f"{SCRAPE_S}s",
            "evaluation_interval": f"{SCRAPE_S}s",
        },
        "rule_files": [str(folder / "alerts.yaml")],
        "scrape_configs": [
            {"job_name": "vllm", "static_configs": [{"targets": [target]}]}
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = ["prometheus", f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, folder / "log")
        yield url
    finally:
        process.terminate()
        process.wait()


def paced_rules(pace: float) -> Any:
    """alerts.yaml with all times multiplied; a window keeps four scrapes at least."""
    rules = yaml.safe_load(ALERTS.read_text())
    for rule in rules["groups"][0]["rules"]:
        rule["for"] = f"{max(round(_seconds(rule['for']) * pace), 1)}s"
        rule["expr"] = re.sub(
            r"\[(\w+)\]",
            lambda window: f"[{max(round(_seconds(window[1]) * pace), 4 * SCRAPE_S)}s]",
            rule["expr"],
        )
    return rules


def _seconds(text: str) -> int:
    """Of a duration in whole minutes, as alerts.yaml has them."""
    found = re.fullmatch(r"(\d+)m", text)
    if not found:
        raise ValueError(f"{text}: not a duration in minutes")
    return 60 * int(found[1])


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urlopen(f"{url}/-/ready", timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError(f"no Prometheus:\n{log.read_text()[-2000:]}")


def _ask(url: str, path: str) -> Any:
    """An answer of Prometheus's API."""
    with urlopen(f"{url}/api/v1/{path}", timeout=30) as answer:
        return json.load(answer)["data"]


def values(url: str, expression: str) -> list[float]:
    """What an instant query gives, NaN left out."""
    found = _ask(url, f"query?query={quote(expression)}")["result"]
    numbers = [float(sample["value"][1]) for sample in found]
    return [number for number in numbers if number == number]


def firing(url: str) -> dict[str, str]:
    """Summaries of the alerts that fire now, by name."""
    return {
        alert["labels"]["alertname"]: alert["annotations"]["summary"]
        for alert in _ask(url, "alerts")["alerts"]
        if alert["state"] == "firing"
    }
