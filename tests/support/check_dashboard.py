"""Every panel and alert against a real Prometheus; see scripts/check-dashboard."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import urlopen

import httpx
import yaml

from hashevict_vllm.bench.server import free_port, serve
from hashevict_vllm.models import fetch_default_model
from support.monitoring import ALERTS, alerts, panels

SCRAPE_S = 2
FLAGS = ["--kv-policy", "hashevict", "--kv-budget", "256", "--enforce-eager"]
# Small enough that the requests below are preempted.
FLAGS += ["--kv-policy-config.segment", "256", "--dtype", "bfloat16"]
FLAGS += ["--max-model-len", "4096", "--num-gpu-blocks-override", "24"]
IN_FLIGHT, PROMPT, OUTPUT = 20, 400, 300


@contextlib.contextmanager
def prometheus(target: str, folder: Path, pace: float = 1) -> Iterator[str]:
    """A Prometheus with our alerts that scrapes a server; yields its URL.

    Args:
        target: The server's URL.
        folder: For its data and configuration.
        pace: Factor on the alerts' times, to see them fire without waiting.

    """
    rules = yaml.safe_load(ALERTS.read_text())
    for rule in rules["groups"][0]["rules"]:
        rule["for"] = f"{max(int(int(rule['for'][:-1]) * 60 * pace), 1)}s"
        # Windows of a quarter of an hour, cut as well.
        for minutes in (10, 15):
            window = f"{max(int(minutes * 60 * pace), 4 * SCRAPE_S)}s"
            rule["expr"] = rule["expr"].replace(f"[{minutes}m]", f"[{window}]")
    (folder / "alerts.yaml").write_text(yaml.safe_dump(rules))
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": "2s"},
        "rule_files": [str(folder / "alerts.yaml")],
        "scrape_configs": [
            {
                "job_name": "vllm",
                "static_configs": [{"targets": [urlsplit(target).netloc]}],
            }
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


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urlopen(f"{url}/-/ready", timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError(f"no Prometheus:\n{log.read_text()[-2000:]}")


def ask(url: str, path: str) -> Any:
    """An answer of Prometheus's API."""
    with urlopen(f"{url}/api/v1/{path}", timeout=30) as answer:
        return json.load(answer)["data"]


def values(url: str, expression: str) -> list[float]:
    """What an instant query gives, NaN left out."""
    found = ask(url, f"query?query={quote(expression)}")["result"]
    numbers = [float(sample["value"][1]) for sample in found]
    return [number for number in numbers if number == number]


def load(url: str, model: str, done: threading.Event) -> None:
    """Keep one request in flight until told to stop."""
    prompt = [100 + i % 1000 for i in range(PROMPT)]
    body = {"model": model, "max_tokens": OUTPUT, "ignore_eos": True}
    while not done.is_set():
        answer = httpx.post(
            f"{url}/v1/completions", json={**body, "prompt": prompt}, timeout=300
        )
        answer.raise_for_status()


@contextlib.contextmanager
def under_load(url: str) -> Iterator[None]:
    """Requests in flight, more than the pool holds, while the block runs."""
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    done = threading.Event()
    threads = [
        threading.Thread(target=load, args=(url, model, done)) for _ in range(IN_FLIGHT)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def check(url: str, seconds: float, folder: Path) -> bool:
    """Whether no panel is empty; prints values and the alerts that fired."""
    # Minutes become tenths of seconds: an alert that waits ten minutes fires after 6 s.
    with prometheus(url, folder, pace=0.01) as server, under_load(url):
        while not values(server, "hashevict:info"):
            time.sleep(0.2)
        time.sleep(2 * SCRAPE_S)  # until then Prometheus has seen no server
        fired: dict[str, str] = {}
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for alert in ask(server, "alerts")["alerts"]:
                if alert["state"] == "firing":
                    name = alert["labels"]["alertname"]
                    fired[name] = alert["annotations"]["summary"]
            time.sleep(1)
        empty = []
        for title, found in panels().items():
            numbers = [values(server, expression) for expression in found]
            shown = ", ".join(" ".join(f"{n:.4g}" for n in part) for part in numbers)
            print(f"{title}: {shown}")
            empty += [title for part in numbers if not part]
        for rule in alerts():
            name = rule["alert"]
            print(f"alert {name}: {fired.get(name, 'silent')}", flush=True)
    for title in empty:
        print(f"EMPTY: {title}", file=sys.stderr)
    return not empty


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="scripts/check-dashboard")
    parser.add_argument("--url", help="a server; started here if not given")
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = options.url
        if url is None:
            model = fetch_default_model()
            variables = {"VLLM_CPU_KVCACHE_SPACE": "1"}
            server = serve(model, FLAGS, folder / "server.log", variables)
            url = stack.enter_context(server).url
        sys.exit(not check(url, options.seconds, folder))


if __name__ == "__main__":
    main()
