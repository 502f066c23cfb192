"""Command line of the evaluation; see ``scripts/evaluate --help``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hashevict_vllm.eval.families import RECIPES

EPILOG = """\
A policy is a name, a preset (paper, reference), name:key=value,... or JSON:
  --policies full hashevict paper hashevict:segment=prompt,hash_bits=128
A share is one of the nominal context length, since an engine has one budget for all
requests: 30% at 1024 is 307 tokens. 100% is the full cache, always run.
full:dtype=float32 or full:batch=5 is a second full cache: what noise costs.
The full cache's own answers are kept in answers.jsonl, beside results.jsonl.
Results that are in results.jsonl are not computed again.
"""


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(
        prog="scripts/evaluate",
        description="Quality of KV-cache policies through the served engine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add(
        "--models",
        "--model",
        nargs="+",
        metavar="MODEL",
        help="names (see python -m hashevict_vllm.models --help) or directories; "
        "default: SmolLM2-135M-Instruct",
    )
    add("--family", choices=RECIPES, help="tasks, length, budgets, samples of one use")
    add("--policies", nargs="+", metavar="POLICY", help="default: every one there is")
    add("--set", metavar="KEY=VALUE,...", help="options added to every policy")
    add("--budgets", nargs="+", metavar="TOKENS|SHARE")
    add("--lengths", nargs="+", type=int, help="nominal context lengths in tokens")
    add("--tasks", nargs="+", metavar="TASK", help="names, families, or all")
    add("--samples", type=int, help="samples per cell")
    add("--seed", type=int, default=0)
    add("--full", action="store_true", help="all tasks, 1k to 4k tokens, 50 samples")
    add("--output", type=Path, default=Path("results"), help="default: results/")
    add("--dtype", default="auto", help="vLLM's dtype (default: the model's)")
    add("--batch", type=int, help="requests at a time (default: 8, or the family's)")
    add("--kv-gib", type=float, help="size of the KV pool (default: the batch's)")
    add("--report-only", action="store_true", help="no runs, only the report")
    add("--list", action="store_true", help="print the grid and stop")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Run the grid and write the report."""
    options = parser().parse_args(arguments)
    # Before vLLM is imported: in this process, quiet, local.
    for key, value in (
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
        ("VLLM_LOGGING_LEVEL", "WARNING"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("HF_HUB_OFFLINE", "1"),
    ):
        os.environ.setdefault(key, value)
    from hashevict_vllm.config import KVPolicyError
    from hashevict_vllm.downloads import DownloadError
    from hashevict_vllm.models import ModelFetchError

    try:
        _run(options)
    except (KVPolicyError, DownloadError, ModelFetchError) as error:
        sys.exit(f"hashevict-vllm: {error}")


def _run(options: argparse.Namespace) -> None:
    from hashevict_vllm.eval import grid
    from hashevict_vllm.eval.engine import EngineOptions
    from hashevict_vllm.eval.records import Store
    from hashevict_vllm.eval.report import write_report
    from hashevict_vllm.eval.runner import Runner
    from hashevict_vllm.eval.tasks import TASKS
    from hashevict_vllm.models import MODEL_NAME, find_model

    names = options.policies or grid.default_policies()
    policies = [grid.parse_policy(name, options.set or "") for name in names]
    recipe = RECIPES.get(options.family)
    scale = grid.FULL_GRID if options.full else grid.DEFAULT_GRID
    wanted: Sequence[str] | None = None if options.full else grid.DEFAULT_TASKS
    if recipe is not None:
        scale = grid.Scale(recipe.budgets, (recipe.length,), recipe.samples)
        wanted = recipe.tasks
    tasks = select_tasks(options.tasks or wanted, list(TASKS))
    batch = options.batch or (recipe.batch if recipe else 8)
    engines = grid.cells(
        policies,
        options.budgets or scale.budgets,
        tasks,
        options.lengths or scale.lengths,
    )
    samples = options.samples or scale.samples
    if options.list:
        for policy, budget, cells in engines:
            print(f"{policy.label}@{budget or 'full'}: {len(cells)} cells × {samples}")
        return
    store = Store(options.output / "results.jsonl")
    command = "scripts/evaluate " + " ".join(sys.argv[1:])
    for name in options.models or [MODEL_NAME]:
        model = find_model(name)
        if not options.report_only:
            common = EngineOptions(str(model), options.dtype, batch, options.kv_gib)
            Runner(common, store, samples=samples, seed=options.seed).run(engines)
        records = [r for r in store.records.values() if r["model"] == model.name]
        print(write_report(records, TASKS, options.output / model.name, command))


def select_tasks(wanted: Sequence[str] | None, known: list[str]) -> list[str]:
    """Task names of names and families."""
    if not wanted or list(wanted) == ["all"]:
        return known
    for name in wanted:
        if not any(task == name or task.startswith(f"{name}/") for task in known):
            sys.exit(f"--tasks: unknown task {name!r}; known are {', '.join(known)}.")
    return [
        task
        for task in known
        if any(task == name or task.startswith(f"{name}/") for name in wanted)
    ]


if __name__ == "__main__":
    main()
