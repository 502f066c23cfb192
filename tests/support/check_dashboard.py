"""Every panel, every alert against a real Prometheus; see scripts/check-dashboard."""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from hashevict_vllm.bench.server import free_port, serve_command
from hashevict_vllm.models import fetch_default_model
from support.monitoring import alerts, panels
from support.prometheus import SCRAPE_S, firing, prometheus, values
from support.server import REQUEST_TIMEOUT_S, Server, run, server_env

PACE = 0.01
"""Minutes of the alerts become tenths of seconds: one of ten minutes waits for 6 s."""

IDLE_S = 40
"""Longer than the slowest alert needs at that pace: a window of 9 s, then 18 s."""

PROVOKED_WITHIN_S = 240

STOCK = ["--enforce-eager", "--dtype", "bfloat16", "--max-model-len", "4096"]
POLICY = ["--kv-policy", "hashevict", "--kv-budget", "256"]
POLICY += ["--kv-policy-config.segment", "256"]
# A pool of 23 blocks, of which a request fills two; without a policy, not one fits.
POLICY += ["--num-gpu-blocks-override", "24"]


# -- Requests ------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """Requests that are in flight all the time.

    Attributes:
        in_flight: How many.
        prompt: Tokens of each prompt; no two are alike, so that no block is shared.
        output: Tokens of each answer.

    """

    in_flight: int
    prompt: int
    output: int


LONG = Load(in_flight=4, prompt=20, output=4000)
"""Few, and each fifteen times the budget."""

CROWD = Load(in_flight=40, prompt=20, output=400)
"""More than the pool holds. All begin with one block, and then want a second."""

SHORT = Load(in_flight=20, prompt=400, output=60)
"""Requests that end soon, for panels that show finished ones."""


@contextlib.contextmanager
def under(load: Load, url: str) -> Iterator[None]:
    """Keep the load on a server while the block runs.

    Raises:
        httpx.HTTPError: If a request fails.
        RuntimeError: If a stream ends with an error.

    """
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    done = threading.Event()
    with ThreadPoolExecutor(load.in_flight) as pool:
        clients = [
            pool.submit(_ask_on, load, url, model, random.Random(seed), done)
            for seed in range(load.in_flight)
        ]
        try:
            yield
        finally:
            done.set()
        for client in clients:
            client.result()


def _ask_on(
    load: Load, url: str, model: str, draw: random.Random, done: threading.Event
) -> None:
    """One client: a request after the other, the last one left in its middle."""
    while not done.is_set():
        prompt = [draw.randrange(100, 10_000) for _ in range(load.prompt)]
        body = {"model": model, "prompt": prompt, "max_tokens": load.output}
        body |= {"ignore_eos": True, "stream": True}
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=body, timeout=REQUEST_TIMEOUT_S
        ) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith('data: {"error"'):
                    raise RuntimeError(line)
                if done.is_set():
                    break


# -- What must be seen ---------------------------------------------------------------


class Watch:
    """Which alerts fire in a Prometheus, and whether they should.

    Attributes:
        faults: A sentence for everything that was not as it should be.

    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.faults: list[str] = []
        self._due = {rule["alert"] for rule in alerts()}

    def silent(self, seconds: float) -> None:
        """While nothing is wrong no alert may fire."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for name, summary in firing(self.url).items():
                self._blame(f"{name} fired on an idle server: {summary}")
            time.sleep(1)
        print(f"idle for {seconds:.0f} s: {len(self.faults)} alerts", flush=True)

    def fires(self, provocation: str, *names: str) -> None:
        """Under a provocation these alerts fire, and none whose turn is later."""
        began, due = time.monotonic(), set(names)
        while due and time.monotonic() - began < PROVOKED_WITHIN_S:
            time.sleep(1)
            for name, summary in firing(self.url).items():
                if name in due:
                    due.remove(name)
                    after = f"{provocation}, after {time.monotonic() - began:.0f} s"
                    print(f"{after}: {name}: {summary}", flush=True)
        for name in sorted(due):
            self._blame(f"{name} was silent for {PROVOKED_WITHIN_S} s of {provocation}")
        self._due -= set(names)
        for name in sorted(self._due & firing(self.url).keys()):
            self._blame(f"{name} fired too, at {provocation}")

    def all_provoked(self) -> None:
        """No alert may be left out here."""
        for name in sorted(self._due):
            self._blame(f"{name} was never provoked")

    def _blame(self, fault: str) -> None:
        if fault not in self.faults:
            self.faults.append(fault)


def empty_panels(url: str) -> list[str]:
    """A sentence for each panel without a value; prints all values."""
    faults = []
    for title, found in panels().items():
        numbers = [values(url, expression) for expression in found]
        shown = ", ".join(" ".join(f"{n:.4g}" for n in part) for part in numbers)
        print(f"panel {title}: {shown}", flush=True)
        if not all(numbers):
            faults.append(f"the panel {title} is empty")
    return faults


def wait_until_scraped(url: str) -> None:
    """Return once Prometheus has seen a server with a policy for some scrapes."""
    deadline = time.monotonic() + PROVOKED_WITHIN_S
    while not values(url, "hashevict:info"):
        if time.monotonic() > deadline:
            raise TimeoutError("Prometheus has seen no hashevict:info")
        time.sleep(0.2)
    time.sleep(2 * SCRAPE_S)  # an alert that fired without a server ends


# -- The checks ----------------------------------------------------------------------


def check_own(folder: Path) -> list[str]:
    """Start servers, provoke every alert, look at every panel.

    The second server stands where the first did, as one whose command has lost its
    policy.

    Args:
        folder: For logs and Prometheus's data.

    Returns:
        The faults.

    """
    model, port = fetch_default_model(), free_port()

    def server(name: str, flags: Sequence[str]) -> AbstractContextManager[Server]:
        command = serve_command(model, flags, port)
        return run(command, port, folder / f"{name}.log", server_env())

    with prometheus(f"127.0.0.1:{port}", folder, PACE) as url:
        watch = Watch(url)
        with server("policy", [*STOCK, *POLICY]) as running:
            wait_until_scraped(url)
            watch.silent(IDLE_S)
            with under(LONG, running.url):
                watch.fires("few long answers", "HashevictEvictsNearlyAll")
            with under(CROWD, running.url):
                watch.fires(
                    "more requests than fit",
                    "HashevictKVPoolNearlyFull",
                    "HashevictQueue",
                    "HashevictReplays",
                )
                watch.faults += empty_panels(url)
        watch.fires("a server that was stopped", "HashevictDown")
        with server("stock", STOCK):
            watch.fires("a server without a policy", "HashevictPolicyOff")
    watch.all_provoked()
    return watch.faults


def check_other(server: str, seconds: float, folder: Path) -> list[str]:
    """Look at every panel while requests run on somebody's server; say what fires.

    Args:
        server: Its URL; it is neither stopped nor replaced.
        seconds: How long requests run.
        folder: For Prometheus's data.

    Returns:
        The faults.

    """
    with prometheus(urlsplit(server).netloc, folder, PACE) as url, under(SHORT, server):
        wait_until_scraped(url)
        time.sleep(seconds)
        for name, summary in firing(url).items():
            print(f"fires: {name}: {summary}", flush=True)
        return empty_panels(url)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="scripts/check-dashboard")
    parser.add_argument("--url", help="a server; started here if not given")
    parser.add_argument("--seconds", type=float, default=60, help="with --url")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.url:
            faults = check_other(options.url, options.seconds, Path(name))
        else:
            faults = check_own(Path(name))
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
