"""The grid: policies × budgets × tasks × nominal lengths.

An engine has one budget, in tokens, for all its requests, so a budget cannot be a share
of each sample's own prompt length. Instead every task makes samples for a *nominal*
context length (1k, 2k, 4k: the largest that fits, output included), and a share is a
share of that length: 30 % at 1k is 307 tokens. Samples are grouped by nominal length,
and lengths whose budgets come to the same tokens share an engine. At 100 % nothing is
evicted (outputs are byte-identical to stock, tests/test_under_budget.py): that is the
full cache's row, which is run once per length.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hashevict_vllm.config import (
    POLICY_NAMES,
    PRESETS,
    KVPolicyConfig,
    KVPolicyError,
)
from hashevict_vllm.resolved import default_value_votes, default_vote_every

FULL = "full"


@dataclass(frozen=True)
class Scale:
    """Extent of a grid."""

    budgets: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int


_SHARES = ("10%", "30%", "50%", "70%", "90%")
DEFAULT_GRID = Scale(_SHARES[:-1], (1024,), 6)
DEFAULT_TASKS = (
    "retrieval/niah_single_2",
    "retrieval/niah_multikey_1",
    "retrieval/qa_1",
    "reasoning/gsm8k",
    "choice/squad",
    "summarisation/own",
    "summarisation/prose",
)
"""What runs unless tasks are named or the grid is the full one."""

HARD_BOUNDED = "hashevict:segment=256"
FULL_GRID = Scale((*_SHARES, "256", "512", "1024"), (1024, 2048, 4096), 50)


@dataclass(frozen=True)
class Policy:
    """A policy of the grid.

    Attributes:
        label: What reports call it.
        options: Keys of `KVPolicyConfig`, without the budget.
        engine: Fields of `EngineOptions` in which the engine differs from the run's:
            a second full cache, which shows what noise alone costs.

    """

    label: str
    options: Mapping[str, Any]
    engine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        """Whether nothing is ever evicted."""
        return self.options.get("name") == FULL

    def with_budget(self, budget: int | None) -> dict[str, Any]:
        """Return the options of an engine; the full cache has no budget."""
        options = dict(self.options)
        return options if self.is_full else {**options, "budget": budget}

    def resolved(self, budget: int | None) -> dict[str, Any]:
        """Every option with its value: what results are filed under.

        A default that changes later thus starts new results.

        Raises:
            KVPolicyError: When the options are not valid.

        """
        if self.is_full:
            return {"name": FULL, **self.engine}
        config = KVPolicyConfig.from_dict(self.with_budget(budget))
        options = dataclasses.asdict(config)
        del options["preset"]  # what it sets is there
        if budget is not None:  # what is by default depends on it
            options["vote_every"] = config.vote_every or default_vote_every(budget)
            if config.value_votes is None:
                options["value_votes"] = default_value_votes(budget)
        return options


def parse_policy(text: str, common: str = "") -> Policy:
    """Read a policy of the command line.

    ``hashevict`` (a name), ``paper`` (a preset of hashevict),
    ``hashevict:segment=prompt,hash_bits=128``, or JSON such as
    ``{"name": "hashevict", "segment": "prompt", "label": "held"}``. `common` are
    options of the second form for every policy but the full cache, unless it has its
    own. Options of the full cache are the engine's: ``full:dtype=float32``.

    Raises:
        KVPolicyError: When it is none of these.

    """
    text = text.strip()
    if text.startswith("{"):
        try:
            options = json.loads(text)
        except json.JSONDecodeError as error:
            raise KVPolicyError(f"--policies: {error}: {text}") from None
        label = options.pop("label", None) or _label(options)
    else:
        name, _, rest = text.partition(":")
        label = text
        options = {"name": name}
        if name in PRESETS:
            options = {"name": "hashevict", "preset": name}
        if name == FULL:
            return Policy(label, options, _pairs(rest))
        options |= _pairs(rest)
    if common and options.get("name") != FULL:
        extra = {k: v for k, v in _pairs(common).items() if k not in options}
        options |= extra
        label += "".join(f" {key}={value}" for key, value in extra.items())
    policy = Policy(label, options)
    # Wrong names and keys fail now; what depends on the budget, in its cell.
    budget = None if options.get("name") == FULL else 1 << 20
    KVPolicyConfig.from_dict(policy.with_budget(budget))
    return policy


def _pairs(text: str) -> dict[str, Any]:
    """Options of ``key=value,...``."""
    options = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise KVPolicyError(f"--policies: expected key=value, got {item!r}.")
        options[key.strip()] = _value(value.strip())
    return options


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _label(options: Mapping[str, Any]) -> str:
    name = options.get("preset") or options.get("name", "hashevict")
    rest = [f"{k}={v}" for k, v in options.items() if k not in ("name", "preset")]
    return f"{name}:{','.join(rest)}" if rest else str(name)


def parse_budget(text: str, length: int) -> int:
    """Tokens of a budget such as ``30%`` or ``512`` at a nominal length.

    Raises:
        ValueError: When it is neither.

    """
    text = text.strip()
    if text.endswith("%"):
        return int(length * float(text[:-1]) / 100)
    return int(text)


@dataclass(frozen=True)
class Cell:
    """One task at one nominal length, under one policy and budget (None: no limit)."""

    policy: Policy
    budget: int | None
    task: str
    length: int


def cells(
    policies: Sequence[Policy],
    budgets: Sequence[str],
    tasks: Sequence[str],
    lengths: Sequence[int],
) -> list[tuple[Policy, int | None, list[Cell]]]:
    """The cells of a grid by engine; the full cache's come first, asked for or not.

    A budget of at least the nominal length evicts nothing and is left out. A second
    full cache has budget 0: what it is scored at are all positions.
    """
    full = Policy(FULL, {"name": FULL})
    every = [Cell(full, None, task, length) for length in lengths for task in tasks]
    engines: list[tuple[Policy, int | None, list[Cell]]] = [(full, None, every)]
    for policy in policies:
        if policy.is_full:
            again = [dataclasses.replace(c, policy=policy, budget=0) for c in every]
            engines += [(policy, 0, again)] if policy.engine else []
            continue
        by_budget: dict[int, list[Cell]] = {}
        for length in lengths:
            for budget in {parse_budget(text, length) for text in budgets}:
                if budget < length:
                    found = by_budget.setdefault(budget, [])
                    found += [Cell(policy, budget, task, length) for task in tasks]
        engines += [(policy, b, found) for b, found in sorted(by_budget.items())]
    return engines


def default_policies() -> list[str]:
    """Every policy and preset there is, and hashevict with little scratch memory."""
    return [*POLICY_NAMES, *PRESETS, HARD_BOUNDED]
