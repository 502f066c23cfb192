"""``inspection``: what it costs others that many requests are looked at.

A server decodes ``--watched`` requests and ``--others`` beside them, all beyond their
budget, so that every step is as long as the next. In windows that take turns nobody
looks on, or every watched request is asked for its retention once per ``--every``
seconds, as the page does, by a client that waits where it is told to. Timed are the
tokens of the others.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
import urllib.error
from typing import Any
from urllib.request import Request, urlopen

from hashevict_vllm.bench import server, timing
from hashevict_vllm.bench.chat import events
from hashevict_vllm.bench.results import Results, show_progress
from hashevict_vllm.bench.scenarios import model_directory

TOO_EARLY = 429


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    add = parser.add_argument
    add("--watched", type=int, default=64)
    add("--others", type=int, default=8)
    add("--every", type=float, default=1.0, help="seconds between two questions")
    add("--windows", type=int, default=6, help="pairs of windows")
    add("--seconds", type=float, default=15.0, help="of a window")
    add("--budget", type=int, default=256)
    add("--prompt", type=int, default=300)
    add("--length", type=int, default=8192, help="of the longest request")
    add("--model", default="default", help="default, random or a directory")


def run(options: argparse.Namespace, results: Results) -> None:
    """Serve, fill the batch, and open and close the windows."""
    model = model_directory(options.model)
    flags = ["--kv-policy", "hashevict", "--kv-budget", str(options.budget)]
    flags += ["--kv-policy-config.inspect", "true", "--dtype", "bfloat16"]
    flags += ["--max-model-len", str(options.length), "--enforce-eager"]
    flags += ["--max-num-seqs", str(options.watched + options.others)]
    flags += ["--disable-uvicorn-access-log"]
    log = results.directory / "inspection.log"
    with server.serve(model, flags, log, {"VLLM_CPU_KVCACHE_SPACE": "2"}) as running:
        clients = Clients(running.url, str(model), options)
        clients.fill(running)
        for _ in show_progress(range(options.windows), "windows"):
            for asked in (False, True):
                results.add(clients.window(asked))
        clients.leave()
    say(results)


def say(results: Results) -> None:
    """How much longer a token of the others took, by pairs of windows."""
    alone, beside = (
        [row["seconds_per_token"] for row in results.rows if row["asked"] is asked]
        for asked in (False, True)
    )
    ratio = timing.ratio(beside, alone)
    results.note("ratio", ratio.as_dict())
    told, early = (sum(row[k] for row in results.rows) for k in ("answers", "early"))
    results.say(
        f"seconds per token, asked / alone: {ratio.show(digits=3)}; {told} answers, "
        f"{early} told to wait"
    )


class Clients:
    """Those who wait for tokens, and those who ask.

    Attributes:
        times: By other request, when its tokens came.

    """

    def __init__(self, url: str, model: str, options: argparse.Namespace) -> None:
        self._url, self._model, self._options = url, model, options
        self._asking, self._over = threading.Event(), threading.Event()
        self._answers = self._early = 0
        self._lock = threading.Lock()
        self.times: list[list[float]] = [[] for _ in range(options.others)]

    def fill(self, running: server.Server) -> None:
        """Start all requests; return when all of them decode beyond their budget."""
        options = self._options
        for number in range(options.watched + options.others):
            threading.Thread(target=self._stream, args=(number,), daemon=True).start()
        for number in range(options.watched):
            threading.Thread(target=self._ask, args=(number,), daemon=True).start()
        enough = options.watched + options.others
        while (
            running.metrics().get("num_requests_running", 0) < enough
            or min(map(len, self.times)) < 2
        ):
            time.sleep(1)

    def window(self, asked: bool) -> dict[str, Any]:
        """One window; what a token of the others took in it."""
        self._answers = self._early = 0
        if asked:
            self._asking.set()
        start = time.perf_counter()
        time.sleep(self._options.seconds)
        stop = time.perf_counter()
        self._asking.clear()
        spans = [[t for t in times if start <= t < stop] for times in self.times]
        tokens = sum(len(span) - 1 for span in spans)
        return {
            "asked": asked,
            "seconds_per_token": sum(span[-1] - span[0] for span in spans) / tokens,
            "tokens": tokens,
            "answers": self._answers,
            "early": self._early,
        }

    def leave(self) -> None:
        """Let the asking threads end; streams end with their server."""
        self._over.set()

    def _stream(self, number: int) -> None:
        options = self._options
        body = {
            "model": self._model,
            "prompt": [
                1000 + (number * 37 + i * 11) % 9000 for i in range(options.prompt)
            ],
            "max_tokens": options.length - options.prompt - 1,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        headers = {"Content-Type": "application/json", "X-Request-Id": str(number)}
        url = f"{self._url}/v1/completions"
        other = number - options.watched
        try:
            for _ in events(Request(url, json.dumps(body).encode(), headers)):
                if other >= 0:
                    self.times[other].append(time.perf_counter())
        except (OSError, ValueError):
            if not self._over.is_set():
                raise

    def _ask(self, number: int) -> None:
        """Ask for one request's retention, as often and as late as the page does."""
        path = f"v1/kv_policy/requests/cmpl-{number}/retention?columns=1&include=bitmap"
        # Not all at once.
        time.sleep(self._options.every * number / self._options.watched)
        while not self._over.is_set():
            self._asking.wait()
            pause = self._options.every
            try:
                with urlopen(f"{self._url}/{path}", timeout=60) as answer:
                    answer.read()
                    self._count(answers=1)
            except urllib.error.HTTPError as error:
                if error.code != TOO_EARLY:
                    raise
                self._count(early=1)
                pause = float(error.headers["Retry-After"])
            except OSError:
                if not self._over.is_set():
                    raise
            time.sleep(pause)

    def _count(self, answers: int = 0, early: int = 0) -> None:
        with self._lock:
            self._answers += answers
            self._early += early


def _prompt(number: int, length: int) -> list[int]:
    """Token ids that no other request shares, beyond a tokenizer's special ones."""
    return [1000 + (37 * number + 11 * i) % 9000 for i in range(length)]
