"""One-line mutations of the code, each of which some test must notice.

Run by ``scripts/mutations [NAME...]``. Every mutation is applied to a copy of the
checkout and judged by the few tests that are named with it, which must fail (a crash
or an error of collection does not count) within `SECONDS`; before, the same tests must
pass in an unchanged copy. A line that is not there, or there twice, ends the run: the
list must follow the code.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SECONDS = 60
PACKAGE = "hashevict_vllm"


@dataclass(frozen=True)
class Mutation:
    """A line, what it becomes, and who must notice.

    Attributes:
        name: A word for the command line and the table.
        file: Below `PACKAGE`.
        old: The line without its indentation; exactly one line of the file.
        new: What it becomes.
        tests: Arguments of pytest, below ``tests``.

    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


PLAN = ("test_plan.py",)
VOTERS = ("policies/test_voters.py",)


def kernels(expression: str) -> tuple[str, ...]:
    """Tests of the CPU kernels against the oracle."""
    return ("kernels/cpu/test_cpu_kernels.py", "-k", expression)


MUTATIONS = (
    Mutation(
        "window",
        "resolved.py",
        "return range(max(start, begin, end - self.window, self.sinks, 1), stop)",
        "return range(max(start, begin, end - self.window - 1, self.sinks, 1), stop)",
        VOTERS,
    ),
    Mutation(
        "horizon", "resolved.py", "VOTE_HORIZON = 256", "VOTE_HORIZON = 255", VOTERS
    ),
    Mutation(
        "ballot distance",
        "resolved.py",
        "-(-first // self.vote_every) * self.vote_every, stop, self.vote_every",
        "-(-first // self.vote_every) * self.vote_every, stop, self.vote_every + 1",
        VOTERS,
    ),
    Mutation(
        "complement",
        "kernels/cpu/votes.py",
        "tail[at] = ~position[i]",
        "tail[at] = -position[i]",
        kernels("losers_of_a_ballot_are_marked"),
    ),
    Mutation(
        "complement in replay",
        "kernels/cpu/replay.py",
        "pages.tail[at] = ~pages.tail[at]",
        "pages.tail[at] = -pages.tail[at]",
        kernels("victims_are_marked"),
    ),
    Mutation(
        "protected range",
        "policies/base.py",
        "oldest_last = self.policy.recent + 1",
        "oldest_last = self.policy.recent",
        kernels("every_baseline and random and 64"),
    ),
    Mutation(
        "tie to youngest",
        "policies/base.py",
        "key = self.score(q_bits, k_bits, slots, t) * 2**32 - position",
        "key = self.score(q_bits, k_bits, slots, t) * 2**32 + position",
        kernels("every_signature_length and query and 4"),
    ),
    Mutation(
        "sign of hash",
        "kernels/signature.py",
        "return x.to(torch.float32) @ projection >= 0",
        "return x.to(torch.float32) @ projection > 0",
        kernels("signatures_equal_the_oracle_at_zero"),
    ),
    Mutation(
        "live slots",
        "attention/rounds.py",
        "return np.where(self.evict, self.slot, self.slot + self.count)",
        "return np.where(self.evict, self.slot, self.slot + self.count - 1)",
        PLAN,
    ),
    Mutation(
        "reduction",
        "plan.py",
        "if stop == boundary and slot + stop - position > budget:",
        "if stop == boundary and slot + stop - position >= budget:",
        PLAN,
    ),
    Mutation(
        "scratch",
        "cache/manager.py",
        "processed_computed_tokens < self._prompt_len[request_id]",
        "processed_computed_tokens < self._prompt_len[request_id] // 2",
        ("cache/test_memory.py", "-k", "contract and held"),
    ),
    Mutation(
        "resumed prompt",
        "cache/manager.py",
        "self._prompt_len[request_id] = request.num_prompt_tokens",
        "self._prompt_len[request_id] = request.num_tokens",
        ("cache/test_prefix_caching.py", "-k", "resumed_request_asks"),
    ),
    Mutation(
        "blocks zeroed",
        "vllm_patches/block_zeroing.py",
        "return stock(self) or shares_metadata(self.kv_cache_groups)",
        "return stock(self)",
        ("test_hybrid.py", "-k", "stale_bits or zeroed_only"),
    ),
    Mutation(
        "decay",
        "policies/vote.py",
        "slots.votes.mul_(self.policy.decay)",
        "slots.votes.mul_(self.policy.decay**2)",
        kernels("oracle_for_votes and float32 and 64"),
    ),
    Mutation(
        "votes for values",
        "policies/value.py",
        "return size * (votes / size.sum(1, keepdim=True))",
        "return size * (votes / size.amax(1, keepdim=True))",
        kernels("oracle_for_votes and float32 and 64"),
    ),
)


class StaleMutation(Exception):
    """The code has moved on, and the list must follow."""


def apply(mutation: Mutation, checkout: Path) -> None:
    """Change the line in a copy.

    Raises:
        StaleMutation: If it is not there exactly once.

    """
    path = checkout / PACKAGE / mutation.file
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [i for i, line in enumerate(lines) if line.strip() == mutation.old]
    if len(found) != 1:
        raise StaleMutation(
            f"{mutation.name}: {mutation.file} has {len(found)} lines "
            f"`{mutation.old}` instead of one; tests/support/mutations.py must follow."
        )
    indent = lines[found[0]].partition(mutation.old)[0]
    lines[found[0]] = indent + mutation.new
    path.write_text("\n".join(lines) + "\n")


@contextlib.contextmanager
def copied(directory: Path) -> Iterator[Path]:
    """A copy of what the tests need, for a while.

    Always at one path: kernels are compiled anew for a module that lies elsewhere.
    """
    checkout = directory / "checkout"
    for name in (PACKAGE, "tests", "patches"):
        ignored = shutil.ignore_patterns("__pycache__", "*.nbc", "*.nbi")
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", checkout)
    try:
        yield checkout
    finally:
        shutil.rmtree(checkout)


def run_tests(tests: tuple[str, ...], checkout: Path, seconds: float) -> int | None:
    """Exit status of pytest in a copy; None if it took too long."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    try:
        return subprocess.run(
            [*command, f"tests/{tests[0]}", *tests[1:]],
            cwd=checkout,
            env={
                **os.environ,
                "PYTHONPATH": f"{checkout}{os.pathsep}{checkout}/tests",
                "NUMBA_CACHE_DIR": str(checkout.with_name("kernels")),
            },
            capture_output=True,
            timeout=seconds,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        return None


def judge(mutation: Mutation, directory: Path, seconds: float) -> tuple[bool, str]:
    """Whether the mutation was noticed, and a row of the table."""
    with copied(directory) as checkout:
        apply(mutation, checkout)
        start = time.monotonic()
        status = run_tests(mutation.tests, checkout, seconds)
        took = time.monotonic() - start
    verdicts = {1: "noticed", 0: "NOT NOTICED", None: "TOO SLOW"}
    verdict = verdicts.get(status, f"BROKEN (exit status {status})")
    cells = (
        mutation.name,
        f"`{mutation.file}`",
        f"`{' '.join(mutation.tests)}`",
        f"{verdict}, {took:.0f} s",
    )
    return status == 1, f"| {' | '.join(cells)} |"


def check_unchanged(mutations: list[Mutation], directory: Path) -> bool:
    """Whether the same tests pass without a mutation; compiles the kernels, too."""
    with copied(directory) as checkout:
        passed = True
        for tests in dict.fromkeys(mutation.tests for mutation in mutations):
            status = run_tests(tests, checkout, 10 * SECONDS)
            if status != 0:
                print(f"{' '.join(tests)}: exit status {status} without a mutation")
                passed = False
    return passed


def run(mutations: list[Mutation], directory: Path, seconds: float) -> bool:
    """Print the table; whether every mutation was noticed."""
    passed = check_unchanged(mutations, directory)
    print("| Mutation | File | Tests | |\n|---|---|---|---|", flush=True)
    for mutation in mutations:
        try:
            noticed, row = judge(mutation, directory, seconds)
        except StaleMutation as stale:
            noticed, row = False, str(stale)
        passed &= noticed
        print(row, flush=True)
    return passed


def main() -> None:
    """Command line: exit status 1 if a mutation was not noticed in time."""
    names = [mutation.name for mutation in MUTATIONS]
    parser = argparse.ArgumentParser(prog="scripts/mutations", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each")
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"no mutation is called {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTATIONS if m.name in options.names or not options.names]
    with tempfile.TemporaryDirectory() as folder:
        passed = run(chosen, Path(folder), options.seconds)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
