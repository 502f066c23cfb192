"""Means over families, intervals, and which results a report takes."""

from __future__ import annotations

import math

import pytest

from hashevict_vllm.eval.aggregate import aggregate
from hashevict_vllm.eval.compare import compare
from hashevict_vllm.eval.records import KEY_FIELDS, key_of, latest
from hashevict_vllm.eval.tasks.base import Task


def _record(policy: str, task: str, index: int, score: float, nll: float) -> dict:
    budget = None if policy == "full" else 2
    values = ["m", "auto", {"name": policy}, None, budget, task, 4, 0, index, None]
    return {
        **dict(zip(KEY_FIELDS, values, strict=True)),
        "policy": policy,
        "score": {"score": score, "nll": nll},
        "versions": {},
    }


def test_the_mean_is_over_families_without_weak_tasks() -> None:
    names = ("a/one", "a/two", "b/weak", "c/text")
    tasks = {name: Task(name, None, None) for name in names}  # type: ignore[arg-type]
    tasks["c/text"] = Task("c/text", None, None, "perplexity")  # type: ignore[arg-type]
    full = {"a/one": 1.0, "a/two": 0.5, "b/weak": 0.1}
    mine = {"a/one": 0.5, "a/two": 0.5, "b/weak": 0.0}
    records = [
        _record(policy, name, index, scores[name], nll)
        for policy, scores, nll in (("full", full, 1.0), ("p", mine, 1.5))
        for name in scores
        for index in range(4)
    ]
    for policy, values in (("full", [1, 1, 2, 2]), ("p", [9, 9, 3, 3])):
        record = _record(policy, "c/text", 0, 0.0, 0.0)
        record |= {"logprobs": [-v for v in values], "first_position": 0}
        record["score"] = {"nll": sum(values) / 4}
        records.append(record)
    lines, weak = aggregate(records, tasks)
    assert weak == {4: ["b/weak"]}
    line = next(line for line in lines if line.policy == "p")
    assert line.families["a"].value == pytest.approx(0.75)
    assert line.tasks["b/weak"].value == pytest.approx(math.exp(-0.5))
    # Of prose, only positions from the budget (2) on count.
    assert line.families["c"].value == pytest.approx(math.exp(-1))
    assert set(line.families) == {"a", "c"}
    assert line.mean is not None
    assert line.mean.value == pytest.approx((0.75 + math.exp(-1)) / 2)
    assert line.mean.low <= line.mean.value <= line.mean.high
    expected = (0.75 + math.exp(-0.5) + math.exp(-1)) / 3
    assert line.mean_all is not None
    assert line.mean_all.value == pytest.approx(expected)


def test_intervals_widen_with_the_spread_of_samples() -> None:
    tasks = {"a/one": Task("a/one", None, None)}  # type: ignore[arg-type]
    records = [_record("full", "a/one", i, 1.0, 1.0) for i in range(20)]
    records += [_record("p", "a/one", i, float(i % 2), 1.0) for i in range(20)]
    figure = aggregate(records, tasks)[0][1].tasks["a/one"]
    assert figure.value == 0.5
    assert figure.n == 20
    assert 0.2 < figure.low < 0.4 < 0.6 < figure.high < 0.8


def test_a_difference_is_drawn_for_both_policies_at_once() -> None:
    tasks = {name: Task(name, None, None) for name in ("a/one", "b/two")}  # type: ignore[arg-type]
    scores = {"full": lambda i: 1.0, "hashevict": lambda i: 0.5 + i % 2 / 2}
    scores["worse"] = lambda i: i % 2 / 2 + 0.25
    records = [
        _record(policy, name, i, score(i), 1.0)
        for policy, score in scores.items()
        for name in tasks
        for i in range(20)
    ]
    records += [_record("unfinished", "a/one", i, 1.0, 1.0) for i in range(20)]
    # Samples that only one of the two has are left out.
    records += [_record("hashevict", "a/one", 20, 0.0, 1.0)]
    (found,) = compare(records, tasks)
    assert found.policy == "worse"
    assert found.mean.n == 40
    for figure in (found.mean, *found.families.values()):
        # Each alone is uncertain; sample by sample they are a quarter apart.
        assert figure.value == pytest.approx(0.25)
        assert figure.low == pytest.approx(0.25)
        assert figure.high == pytest.approx(0.25)


def test_an_unfinished_policy_has_no_mean() -> None:
    tasks = {n: Task(n, None, None) for n in ("a/one", "b/two")}  # type: ignore[arg-type]
    records = [_record("full", name, i, 1.0, 1.0) for name in tasks for i in range(3)]
    records += [_record("p", "a/one", i, 1.0, 1.0) for i in range(3)]
    line = aggregate(records, tasks)[0][1]
    assert line.families["a"].value == 1.0
    assert line.mean is None
    assert line.mean_all is None


def test_offline_results_are_set_against_the_full_cache_run_offline() -> None:
    tasks = {"a/one": Task("a/one", None, None)}  # type: ignore[arg-type]
    full, ours = _record("full", "a/one", 0, 1.0, 1.0), _record("p", "a/one", 0, 0.5, 1)
    slow = {**full, "policy": "full (offline)", "way": "offline"}
    slow["score"] = {"score": 0.5, "nll": 1.0}
    other = {**ours, "policy": "H2O (offline)", "way": "offline"}
    lines, _ = aggregate([slow, other, full, ours], tasks)
    found = {line.policy: line.tasks["a/one"].value for line in lines}
    assert found == {
        "full": 1.0,
        "full (offline)": 1.0,
        "p": 0.5,
        "H2O (offline)": 1.0,
    }


def test_results_of_older_options_stay_out_of_the_report() -> None:
    full = _record("full", "a/one", 0, 1.0, 1.0)
    old, new = (_record("p", "a/one", 0, score, 1.0) for score in (0.0, 1.0))
    old["options"] = {"name": "p", "hash_bits": 16}
    assert latest([full, old, new]) == [full, new]


def test_results_of_older_prompts_are_neither_found_nor_reported() -> None:
    old = _record("full", "a/one", 0, 0.0, 1.0)
    new = {**old, "version": 2}
    assert key_of(old) != key_of(new)
    assert latest([old, new]) == [new]
    del old["version"]  # as written before tasks had versions
    assert key_of(old) == key_of({**old, "version": None})
