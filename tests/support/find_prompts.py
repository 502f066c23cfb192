"""Prints the seeds of prompts that are stable under rounding noise, for a test's table.

Run from the repository: ``PYTHONPATH=tests python -m support.find_prompts``. The engine
takes no part: a seed is chosen by the oracle alone (`Oracle.is_stable`).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from support.models import make_llama, random_prompt
from support.oracle import Oracle, resolve


def main() -> None:
    import test_over_budget as table

    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    for name, overrides in table.MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            oracle = Oracle(make_llama(Path(folder), **overrides))
            for case in table.CASES:
                if case.model != name or (wanted and case.name not in wanted):
                    continue
                policy = resolve(case.policy, case.block_size)
                seeds = []
                for length in case.lengths:
                    seed = 0
                    while not oracle.is_stable(random_prompt(length, seed), policy):
                        seed += 1
                    seeds.append(seed)
                print(f"{case.name!r}: {tuple(seeds)},", flush=True)


if __name__ == "__main__":
    main()
