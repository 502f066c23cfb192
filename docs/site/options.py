"""The tables of flags, from `KVPolicyConfig`, which `vllm serve --help` reads too."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# The checkout that is documented, whatever else is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hashevict_vllm import cli
from hashevict_vllm.config import (
    HASH_OPTIONS,
    PRESETS,
    SCORING_OPTIONS,
    SCORINGS,
    KVPolicyConfig,
)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |"
        for line in lines
    )


def flags() -> str:
    """The command-line options, from the parser that vLLM is given."""
    parser = argparse.ArgumentParser(add_help=False)
    cli.add_kv_policy_args(parser)
    rows = []
    for action in parser._actions:
        values = action.metavar or ", ".join(f"`{c}`" for c in action.choices or ())
        # Of --kv-policy-config the keys have a table of their own.
        text = (action.help or "").partition(" Keys:\n")[0].replace("%%", "%")
        rows.append([f"`{action.option_strings[0]}`", f"{values}", text])
    return table(["Flag", "Value", "Meaning"], rows)


def keys() -> str:
    """The keys of ``--kv-policy-config``, with who reads them."""
    meanings = cli.attribute_docs()
    rows = [
        [f"`{f.name}`", f"`{json.dumps(f.default)}`", _reader(f.name), meanings[f.name]]
        for f in dataclasses.fields(KVPolicyConfig)
        if f.name not in cli.OWN_FLAG
    ]
    return table(["Key", "Default", "Read by", "Meaning"], rows)


def _reader(key: str) -> str:
    for scoring, names in SCORING_OPTIONS.items():
        if key in names:
            return f"scoring `{scoring}`"
    return "`hashevict`" if key in HASH_OPTIONS else "every policy"


def presets() -> str:
    """What each preset sets."""
    names: list[str] = sorted({key for preset in PRESETS.values() for key in preset})

    def cell(value: Any) -> str:
        return f"`{json.dumps(value)}`"

    rows = [
        [f"`{name}`", *(cell(preset[key]) for key in names)]
        for name, preset in PRESETS.items()
    ]
    return table(["Preset", *(f"`{name}`" for name in names)], rows)


def policies() -> str:
    """Policies and their scorings, the default one first."""
    rows = [
        [f"`{name}`", ", ".join(f"`{s}`" for s in scorings) or "(stock vLLM)"]
        for name, scorings in SCORINGS.items()
    ]
    return table(["Policy", "Scorings, the default first"], rows)


TABLES = {"flags": flags, "keys": keys, "presets": presets, "policies": policies}
"""By the name that pages ask for."""
