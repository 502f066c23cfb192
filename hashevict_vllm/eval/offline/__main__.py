"""Command line of the offline evaluation; see ``scripts/evaluate-offline --help``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

EPILOG = """\
The model runs in transformers on the CPU, so that rules can read exact attention.
Results go where scripts/evaluate has its own: with the same --output, --dtype and
--seed, its --report-only shows both, each relative to the full cache run in its way.
Results that are in results.jsonl are not computed again.
"""

TASKS = [
    "retrieval/niah_single_2",
    "retrieval/niah_multikey_1",
    "retrieval/niah_multiquery",
    "retrieval/qa_1",
    "choice/squad",
    "reasoning/gsm8k",
    "summarisation/own",
    "summarisation/prose",
]


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(
        prog="scripts/evaluate-offline",
        description="Baselines that need attention scores, and oracles of our rule.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--model", help="model directory (default: SmolLM2-135M-Instruct)")
    add("--rules", nargs="+", metavar="RULE", help="default: all of --list")
    add("--budgets", nargs="+", metavar="TOKENS|SHARE", default=["10%", "30%", "50%"])
    add("--length", type=int, default=1024, help="nominal context length in tokens")
    add("--tasks", nargs="+", metavar="TASK", default=TASKS, help="names or families")
    add("--samples", type=int, default=5, help="samples per task")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("results"), help="default: results/")
    add("--dtype", default="auto", help="torch's name of it (default: the model's)")
    add("--threads", type=int, help="threads of torch (default: its own choice)")
    add("--list", action="store_true", help="print rules and tasks, and stop")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Run, and write the report."""
    options = parser().parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from hashevict_vllm.config import KVPolicyError
    from hashevict_vllm.downloads import DownloadError
    from hashevict_vllm.models import ModelFetchError

    try:
        _run(options)
    except (KVPolicyError, DownloadError, ModelFetchError) as error:
        sys.exit(f"hashevict-vllm: {error}")


def _run(options: argparse.Namespace) -> None:
    import torch

    from hashevict_vllm.eval.__main__ import select_tasks
    from hashevict_vllm.eval.grid import parse_budget
    from hashevict_vllm.eval.offline.rules import RULES
    from hashevict_vllm.eval.offline.runner import OfflineRunner
    from hashevict_vllm.eval.records import Store
    from hashevict_vllm.eval.report import write_report
    from hashevict_vllm.eval.tasks import TASKS as KNOWN
    from hashevict_vllm.models import fetch_default_model

    names = options.rules or list(RULES)
    for name in names:
        if name not in RULES:
            sys.exit(f"--rules: unknown rule {name!r}; known are {', '.join(RULES)}.")
    tasks = select_tasks(options.tasks, list(KNOWN))
    if options.list:
        print(f"rules: {', '.join(names)}\ntasks: {', '.join(tasks)}")
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    budgets = [parse_budget(text, options.length) for text in options.budgets]
    command = "scripts/evaluate-offline " + " ".join(sys.argv[1:])
    model = options.model or str(fetch_default_model())
    store = Store(options.output / "results.jsonl")
    rules = [RULES[name](budget) for budget in budgets for name in names]
    runner = OfflineRunner(
        model, options.dtype, store, samples=options.samples, seed=options.seed
    )
    runner.run(rules, tasks, options.length)
    print(write_report(list(store.records.values()), KNOWN, options.output, command))


if __name__ == "__main__":
    main()
