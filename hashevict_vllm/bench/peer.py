"""``peer``: the same prompts, budget and model through kvpress on transformers.

Engines take turns, each in a process of its own. kvpress needs other versions of
transformers than vLLM may, so that it has an interpreter of its own::

    python -m venv peer && peer/bin/pip install -e .[peer]
    scripts/bench peer --peer-python peer/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hashevict_vllm.bench import peer_worker, timing
from hashevict_vllm.bench.results import Results, show_progress
from hashevict_vllm.bench.scenarios import model_directory

ENGINES = ("kvpress", "ours")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's options."""
    add = parser.add_argument
    add(
        "--peer-python",
        default=sys.executable,
        metavar="FILE",
        help="interpreter of an environment that has kvpress",
    )
    add("--model", default="default", help="default, or a directory")
    add("--batch", type=int, default=8)
    add("--prompt", type=int, default=1024, help="tokens")
    add("--output-tokens", type=int, default=512)
    add("--budget", type=int, default=256)
    add("--interval", type=int, default=128, help="tokens between kvpress's cuts")
    add("--rounds", type=int, default=3)
    add("--eager", action="store_true", help="ours with enforce_eager")


def run(options: argparse.Namespace, results: Results) -> None:
    """Run the engines in turn; every run is a row, then the ratios."""
    require_kvpress(options.peer_python)
    model = model_directory(options.model)
    pythons = {"kvpress": options.peer_python, "ours": sys.executable}
    rows: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    runs = [(turn, engine) for turn in range(options.rounds) for engine in ENGINES]
    for turn, engine in show_progress(runs, "peer"):
        found = measure(pythons[engine], engine, model, options)
        seconds = found["seconds"]
        tokens = options.batch * options.output_tokens
        decoded = tokens - options.batch
        row = {
            "engine": engine,
            "round": turn,
            **found,
            "throughput": tokens / seconds["all"],
            "decode_throughput": decoded / (seconds["all"] - seconds["prompt"]),
        }
        rows[engine].append(row)
        results.add(row)
        results.say(
            f"{engine}: {row['throughput']:.1f} tokens/s, in decode "
            f"{row['decode_throughput']:.1f}; prompts {seconds['prompt']:.2f} s"
        )
    for metric in ("throughput", "decode_throughput"):
        ours, theirs = ([row[metric] for row in rows[e]] for e in ("ours", "kvpress"))
        compared = timing.ratio(ours, theirs).as_dict()
        results.note(f"{metric}: ours / kvpress", compared)
        results.say(f"{metric}: {timing.show(compared)} x kvpress's")


def require_kvpress(python: str) -> None:
    """Make sure that an interpreter has kvpress.

    Raises:
        SystemExit: If it has not, with a sentence that says what to do.

    """
    asked = [python, "-c", "import importlib.util as u; print(u.find_spec('kvpress'))"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"--peer-python: {python} does not run ({error}).")
    if found.stdout.strip() == "None":
        sys.exit(
            f"--peer-python: {python} has no kvpress; name the interpreter of an "
            "environment where `pip install hashevict-vllm[peer]` was run."
        )


def measure(
    python: str, engine: str, model: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Run an engine once; returns what its process prints.

    Raises:
        RuntimeError: If the process fails, with the end of its output.

    """
    numbers = {
        "batch": options.batch,
        "prompt": options.prompt,
        "output": options.output_tokens,
        "budget": options.budget,
        "interval": options.interval,
        "threads": options.threads,
    }
    command = [python, str(Path(peer_worker.__file__)), "--engine", engine]
    command += ["--model", str(model)]
    command += [text for key, n in numbers.items() for text in (f"--{key}", str(n))]
    command += ["--eager"] if options.eager else []
    env = dict(os.environ)
    if engine == "kvpress":
        # Of another environment: it must not see this one's packages.
        env.pop("PYTHONPATH", None)
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{engine} failed:\n{(ran.stdout + ran.stderr)[-3000:]}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found
