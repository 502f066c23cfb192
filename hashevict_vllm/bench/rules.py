"""The eviction rules that are measured, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """Options of a policy, and whether it keeps signatures."""

    options: dict[str, Any]
    hashes: bool = False


RULES = {
    "vote": Rule({"name": "hashevict", "scoring": "vote"}, hashes=True),
    "instant": Rule({"name": "hashevict", "scoring": "instant"}, hashes=True),
    "instant-key": Rule(
        {"name": "hashevict", "scoring": "instant", "hash_source": "key"}, hashes=True
    ),
    "streaming_llm": Rule({"name": "streaming_llm"}),
    "l2_norm": Rule({"name": "l2_norm"}),
    "random": Rule({"name": "random"}),
    "key_diff": Rule({"name": "key_diff"}),
}
"""Every policy, and every rule of hashevict."""


def rule_named(name: str, bits: int = 64) -> dict[str, Any]:
    """The options of a rule, with signatures of this length where it keeps any."""
    rule = RULES[name]
    return rule.options | ({"hash_bits": bits} if rule.hashes else {})
