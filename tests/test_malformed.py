"""Malformed options: each is refused with one sentence that names its flag."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from hashevict_vllm.config import KVPolicyConfig, KVPolicyError, option_flag

NOT_A_NUMBER: tuple[Any, ...] = (
    *("", " ", "x", "1 k", "1_", "0x10", "1e3", "-", "+", "%", "1%%", "٪", "½", "NaN"),
    *("inf", "1.5", "None", "null", "true", "\n", "\0", "1\n2", "🙂", "1" * 40),
    *(True, False, 1.5, math.nan, math.inf, b"1", [], [1], (), (1,), {}, {"a": 1}),
    *({1}, object, len, Exception("x"), range(3), 10**30, -(10**30), -1),
)
"""Nothing that counts tokens, bits or votes."""

SHARES = ("0%", "-1%", "101%", "1e9%", "nan%", "inf%", "%%", "1 0 %", "x%", "1%2")

BAD: dict[str, tuple[Any, ...]] = {
    "budget": (*NOT_A_NUMBER, *SHARES, 0, "0", "-5", -(2**63), 10**15 + 1),
    "recent": (*NOT_A_NUMBER, *SHARES, 2**30 + 1, "-5"),
    "segment": (*NOT_A_NUMBER, 0, "0", "Prompt", "prompts", 2**30 + 1, "25%"),
    "sinks": (*NOT_A_NUMBER, 2**30 + 1, "-5", "25%"),
    "hash_bits": (*NOT_A_NUMBER, 0, 1, 2, 3, 5, 63, 129, 132, 256, "25%"),
    "seed": (*NOT_A_NUMBER, 2**63, "25%"),
    "window": (*NOT_A_NUMBER, 0, 2**16 + 1, "25%"),
    "pool": (*NOT_A_NUMBER, 0, 2**16 + 1, "25%"),
    "vote_every": (*NOT_A_NUMBER, 0, 2**16 + 1, "25%"),
    "decay": (
        *("", "x", True, False, 0, -1, 1.01, 2, math.nan, math.inf, [], {}, "0", "2"),
        *(b"1", object, -0.5, "nan", "1e9", (1,)),
    ),
    "value_weight": (
        *("", "x", True, False, -1, -0.5, 2**20 + 1, math.nan, math.inf, [], {}),
        *(b"1", object, "nan", "1e9", (1,)),
    ),
    "orthogonal": ("yes", "true", 0, 1, 1.0, [], {}, "False", object),
    "scoring": ("votes", "Vote", "", 1, True, [], {}, "norm", "recency", "cosine"),
    "preset": ("papers", "Paper", "", 1, True, [], {}, "default"),
    "name": ("hashevit", "", "FULL", 1, True, [], {}, "h2o", "snapkv"),
    "hash_source": ("queries", "Key", "", 1, True, [], {}, "value"),
}

UNKNOWN = (
    "budgets",
    "kv_budget",
    "",
    "Budget",
    "hashbits",
    "segments",
    "__class__",
    "1",
)

SIZES = tuple(
    {"budget": budget, "sinks": sinks, "recent": recent, "segment": segment}
    for budget, sinks, recent, segment in itertools.product(
        (1, 31, 39, "0.01%"), (0, 4, 30), (8, 9, "50%"), (32, 33, 1, "prompt")
    )
)
"""Of blocks of 32 tokens: none of them has room for what is protected and a block."""


def cases() -> list[tuple[str, Any]]:
    return [(key, value) for key, values in BAD.items() for value in values]


def test_there_are_more_than_500() -> None:
    assert len(cases()) + len(UNKNOWN) + len(SIZES) > 500


def refusal(options: Any) -> str:
    """The one sentence with which options are refused, also once the model is known."""
    with pytest.raises(KVPolicyError) as caught:
        KVPolicyConfig.from_dict(options).resolve(4096, 32)
    return str(caught.value)


@pytest.mark.parametrize("key", BAD)
def test_malformed_values_are_refused_with_their_flag(key: str) -> None:
    for value in BAD[key]:
        sentence = refusal({"name": "hashevict", "budget": 1024, key: value})
        assert sentence.startswith(f"{option_flag(key)}: "), (value, sentence)
        assert sentence.endswith((".", "?")), (value, sentence)
        assert "\n" not in sentence, (value, sentence)
        assert len(sentence) < 300, (value, sentence)


@pytest.mark.parametrize("key", UNKNOWN)
def test_unknown_keys_are_refused(key: str) -> None:
    sentence = refusal({"name": "hashevict", "budget": 1024, key: 1})
    assert sentence.startswith(f"--kv-policy-config: unknown key {key!r}; ")


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_that_leave_no_room_are_refused(sizes: dict[str, Any]) -> None:
    assert refusal({"name": "hashevict", **sizes}).startswith("--kv-")


@pytest.mark.parametrize("options", [[], "x", 1, [("name", "hashevict")]], ids=str)
def test_what_is_no_dict_is_refused(options: Any) -> None:
    assert "expected a dict" in refusal(options)
