"""``hashevict-vllm verify``, as far as a machine without a GPU runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hashevict_vllm.verify.__main__ import run_part
from hashevict_vllm.verify.checks import FAILED, Check, compared, table
from hashevict_vllm.verify.part import PARTS, environment
from hashevict_vllm.verify.served import equal_share


def verify(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hashevict_vllm", "verify", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_kernels_are_verified_in_the_interpreter_and_what_was_not_is_said() -> None:
    done = verify("--only", "interpreted-kernels")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if "| " in line]
    results = [row[2] for row in rows[1:]]
    assert results.count("passed") == 2
    assert results.count("not checked") == len(results) - 2 > 0
    assert "hashevict-vllm" in done.stdout.splitlines()[0]


def test_an_engine_is_verified_on_the_cpu() -> None:
    checks = run_part("cpu-engine")
    assert [check.result for check in checks] == ["passed", "passed"]


def test_a_part_that_breaks_is_a_failed_check() -> None:
    (check,) = run_part("no-such-part")
    assert check.result == FAILED
    assert "no-such-part" in check.detail


def test_an_unknown_part_is_refused_on_the_command_line() -> None:
    done = verify("--only", "nothing")
    assert done.returncode == 2
    assert "gpu-kernels" in done.stderr


def test_checks_survive_the_way_between_processes() -> None:
    check = compared("engine", "tokens µs", False, "3 of 4")
    assert check == Check.from_line(check.to_line())
    assert table([check]).splitlines()[-1] == (
        "| engine | tokens µs | FAILED | 3 of 4 |"
    )


@pytest.mark.parametrize("part", PARTS)
def test_only_interpreted_parts_are_interpreted(part: str) -> None:
    assert ("TRITON_INTERPRET" in environment(part)) == part.startswith("interpreted")


def test_tokens_count_as_equal_up_to_the_first_that_differs() -> None:
    assert equal_share([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]]) == 4 / 6
