"""Command line of the benchmarks; see ``scripts/bench --help``."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

COMMANDS = {
    "decode-layer": "eviction step and attention of one layer in decode",
    "evict-parts": "what the eviction step of a layer consists of",
    "prefill-layer": "one layer reads a prompt, segment by segment",
    "capacity": "requests and context lengths that a pool holds",
    "plan": "what planning a step costs, once for all layers",
    "replay": "what others wait for while a preempted request is read again",
    "prefill": "a whole engine reads long prompts",
    "steps": "decode steps of whole engines, in turn",
    "inspection": "what others feel of requests being looked at",
    "serve": "a real `vllm serve` under `vllm bench serve`",
    "peer": "the same work through kvpress on transformers",
}
"""Subcommands, one module each; imported when run, as some need seconds to load."""

EPILOG = """\
Everything that is compared runs in turn, in one process or on one pool; figures are
medians and quartiles. On a shared machine, pin: taskset -c 2 scripts/bench ...
"""


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The arguments; those of a subcommand are declared by its module."""
    made = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Speed and memory of KV budgets against stock vLLM.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        sub = commands.add_parser(
            name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.add_argument("--output", type=Path, default=Path("results/bench"))
        sub.add_argument("--threads", type=int, default=1, help="of attention kernels")
        if name == command:
            _module(name).add_arguments(sub)
    return made


def _module(command: str) -> Any:
    return import_module(f"hashevict_vllm.bench.{command.replace('-', '_')}")


def main(arguments: list[str] | None = None) -> None:
    """Run one subcommand."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = next((word for word in arguments if word in COMMANDS), None)
    # Before vLLM is imported: in this process, quiet, local.
    for key, value in (
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
        ("VLLM_LOGGING_LEVEL", "WARNING"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("HF_HUB_OFFLINE", "1"),
    ):
        os.environ.setdefault(key, value)
    options = parser(command).parse_args(arguments)
    import torch

    from hashevict_vllm.bench.results import Results
    from hashevict_vllm.config import KVPolicyError

    # Before any parallel region: a pool that has spun once goes on spinning.
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    module = _module(options.command)
    results = Results(options.output, options.command, arguments)
    results.note("threads", options.threads)
    try:
        module.run(options, results)
    except KVPolicyError as error:
        sys.exit(f"hashevict-vllm: {error}")
    if hasattr(module, "plot"):
        module.plot(results)
    print(results.path)


if __name__ == "__main__":
    main()
