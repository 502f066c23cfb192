"""KVPolicyConfig: the one place for names, defaults, ranges and validation.

The same keys serve ``--kv-policy-config`` (JSON or dotted form), the
``additional_config={"kv_policy": {...}}`` dict of Python users and the YAML files of
``vllm serve --config``. Nothing here imports vLLM or torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from hashevict_vllm.resolved import (
    ResolvedKVPolicy,
    default_value_votes,
    default_vote_every,
)
from hashevict_vllm.values import (
    KVPolicyError,
    as_int,
    as_number,
    as_tokens,
    fail,
    percent_of,
    shown,
    tokens_of,
)

__all__ = ["KVPolicyConfig", "KVPolicyError", "kv_policy", "option_flag"]

SCORINGS: dict[str, tuple[str, ...]] = {
    "full": (),
    "hashevict": ("vote", "instant"),
    "streaming_llm": ("recency",),
    "l2_norm": ("norm",),
    "key_diff": ("cosine",),
    "random": ("random",),
}
"""Policies and their eviction rules, the default one first (`policies.RULES`)."""

POLICY_NAMES = tuple(SCORINGS)
"""``full`` is stock vLLM; every other name bounds the KV cache."""

HASH_OPTIONS = (
    "preset",
    "hash_bits",
    "hash_source",
    "orthogonal",
    "window",
    "pool",
    "vote_every",
    "decay",
)
"""Options of policies that keep signatures."""

SCORING_OPTIONS = {
    "vote": ("window", "pool", "value_weight", "value_votes", "vote_every", "decay"),
    "instant": ("hash_source",),
}
"""Options that one rule of hashevict alone reads."""

HASHING_POLICIES = ("hashevict",)
"""Policies that keep signatures."""

MAX_BUDGET = 10**15
"""Far beyond any length, yet bytes given by mistake are understood (and cut)."""

MAX_TOKENS = 2**30
"""Bound of the other options that count tokens: positions are int32."""

MAX_VOTES = 2**16
"""Bound of options that vote: kernels loop over so many."""

MAX_WEIGHT = 2**20
"""Of a part of a sum; with more the rest of it would drown in rounding."""

MAX_SEED = 2**63 - 1

HASH_SOURCES = ("query", "key")
MIN_HASH_BITS, MAX_HASH_BITS = 4, 128
SEGMENT_PROMPT = "prompt"

PRESETS: dict[str, dict[str, Any]] = {
    # HashEvict paper, section 3: query-key Hamming distance, Gaussian projection.
    "paper": {
        "scoring": "instant",
        "hash_source": "query",
        "hash_bits": 16,
        "orthogonal": False,
        "sinks": 4,
        "recent": 10,
    },
    # The authors' released code: the new key's signature stands for the query.
    "reference": {
        "scoring": "instant",
        "hash_source": "key",
        "hash_bits": 16,
        "orthogonal": False,
        "sinks": 4,
        "recent": 10,
    },
}
"""Named option sets; explicit keys win over the preset's."""

ADDITIONAL_CONFIG_KEY = "kv_policy"
"""Key of vLLM's ``additional_config`` that holds the policy dict."""


PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "hashevict"
"""Our entry point (pyproject.toml), and its name in ``VLLM_PLUGINS``."""


def option_flag(key: str) -> str:
    """The command-line spelling of a policy key, as used in messages."""
    if key == "name":
        return "--kv-policy"
    if key == "budget":
        return "--kv-budget"
    return f"--kv-policy-config.{key}"


@dataclass(frozen=True)
class KVPolicyConfig:
    """What the user asked for, validated but not yet tied to a model.

    Attributes:
        name: Policy, one of `POLICY_NAMES`.
        budget: Slots per KV head: tokens, or a share of ``max_model_len`` ("25%").
        preset: ``paper`` or ``reference`` (the authors' released code); sets those of
            the options below that are not given.
        scoring: Eviction rule of the policy, its first by default; ``vote`` accumulates
            attention estimated from signatures and judges a segment by its last
            queries, ``instant`` is the paper's one-step Hamming rule.
        hash_bits: Bits of a signature, 4 to 128 in steps of 4.
        hash_source: What is compared with the stored key signatures: the current
            ``query`` (the paper) or the new ``key`` (the authors' released code).
        orthogonal: Orthogonalise the Gaussian projection.
        sinks: Positions below this are never evicted; ``vote`` describes keys by
            them.
        recent: The most recent tokens not evicted in decode: tokens, or a share of the
            budget ("25%"). When ``vote`` judges a segment, at most the last 32.
        segment: Prompt tokens held before the live set is reduced to the budget:
            tokens, or ``"prompt"`` for the whole prompt; 1 is token by token.
        seed: Seed of the projection, or of the random policy.
        window: With ``vote``: last queries of a prompt segment that vote.
        pool: With ``vote``: a slot's votes count for this many positions, itself and
            those that follow it (and one before), when a segment is reduced.
        value_weight: With ``vote``: when a segment is reduced, how much a value unlike
            the others counts beside votes; 0 counts votes alone.
        value_votes: With ``vote``: in decode, votes that every ballot spreads over the
            slots by the squared norm of their values, beside those of the query, which
            are at least 1 in sum; 0 for none. By default ``(320 / budget) ** 1.5``, at
            most 3.
        vote_every: With ``vote``: in decode, one token of so many votes; by default
            one of ``budget / 128``, at most 8.
        decay: With ``vote``: factor on earlier votes at every vote in decode.
        allow_full: Let a request with ``kv_budget`` ``"full"`` keep all of its tokens,
            as in stock vLLM.
        inspect: Let whoever may send requests read, over HTTP, which tokens a live
            request keeps, and serve the page that shows it (docs/inspect.md).

    """

    name: str = "full"
    budget: int | str | None = None
    preset: str | None = None
    scoring: str | None = None
    hash_bits: int = 64
    hash_source: str = "query"
    orthogonal: bool = True
    sinks: int = 4
    recent: int | str = "25%"
    segment: int | str = 4096
    seed: int = 0
    window: int = 16
    pool: int = 15
    value_weight: float = 128.0
    value_votes: float | None = None
    vote_every: int | None = None
    decay: float = 0.95
    allow_full: bool = False
    inspect: bool = False

    @property
    def enabled(self) -> bool:
        """Whether the KV cache is bounded at all."""
        return self.name != "full"

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """All accepted keys of the policy dict."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any] | None) -> KVPolicyConfig:
        """Validate a policy dict.

        Args:
            options: Keys of this class; ``None`` or empty means stock vLLM.

        Raises:
            KVPolicyError: On an unknown key (with the nearest valid name), an unknown
                choice, a value out of range, or a budget that is missing.

        """
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise fail(
                f"additional_config['{ADDITIONAL_CONFIG_KEY}']",
                f"expected a dict of policy options, got {shown(options)}.",
            )
        valid = cls.keys()
        for key in options:
            if key not in valid:
                near = difflib.get_close_matches(str(key), valid, n=1)
                hint = (
                    f"did you mean {near[0]!r}?"
                    if near
                    else f"valid keys are {', '.join(valid)}."
                )
                raise fail("--kv-policy-config", f"unknown key {key!r}; {hint}")
        values = {key: value for key, value in options.items() if value is not None}
        preset = values.get("preset")
        if preset is not None:
            _check_choice("preset", preset, tuple(PRESETS))
            values = {**PRESETS[preset], **values}
        config = cls(**values)
        _check_choice("name", config.name, POLICY_NAMES)
        if config.name not in HASHING_POLICIES and config.enabled:
            for key in HASH_OPTIONS:
                if key in values:
                    raise fail(
                        option_flag(key),
                        f"has no effect with --kv-policy {config.name}, which keeps no "
                        "signatures.",
                    )
        config = config._validated()
        for scoring, keys in SCORING_OPTIONS.items():
            for key in keys:
                if key in values and config.enabled and config.scoring != scoring:
                    raise fail(
                        option_flag(key),
                        f"has no effect with scoring {config.scoring!r}, only with "
                        f"{scoring!r}.",
                    )
        return config

    def _validated(self) -> KVPolicyConfig:
        _check_choice("hash_source", self.hash_source, HASH_SOURCES)
        if self.scoring is not None:
            _check_choice("scoring", self.scoring, SCORINGS[self.name])
        if not self.enabled:
            if self.budget is not None:
                raise fail(
                    "--kv-budget",
                    "needs a policy that bounds the cache; add --kv-policy hashevict.",
                )
            return self
        if self.budget is None:
            raise fail(
                "--kv-budget",
                f"is required with --kv-policy {self.name}: tokens per KV head, "
                "or a share of max_model_len such as 25%.",
            )
        flag = option_flag
        bits = as_int(flag("hash_bits"), self.hash_bits, MIN_HASH_BITS, MAX_HASH_BITS)
        if bits % 4:
            raise fail(
                flag("hash_bits"),
                f"must be a multiple of 4 between {MIN_HASH_BITS} and "
                f"{MAX_HASH_BITS}, got {bits}.",
            )
        segment = self.segment
        if segment != SEGMENT_PROMPT:
            if isinstance(segment, str) and not segment.strip().isdigit():
                raise fail(
                    flag("segment"),
                    f"expected tokens or {SEGMENT_PROMPT!r}, got {shown(segment)}.",
                )
            segment = as_int(flag("segment"), segment, 1, MAX_TOKENS)
        for key in ("orthogonal", "allow_full", "inspect"):
            if not isinstance(value := getattr(self, key), bool):
                raise fail(flag(key), f"expected true or false, got {shown(value)}.")
        scoring = self.scoring or SCORINGS[self.name][0]
        return dataclasses.replace(
            self,
            scoring=scoring,
            budget=as_tokens(flag("budget"), self.budget, 1, MAX_BUDGET),
            hash_bits=bits,
            sinks=as_int(flag("sinks"), self.sinks, 0, MAX_TOKENS),
            recent=as_tokens(flag("recent"), self.recent, 0, MAX_TOKENS),
            segment=segment,
            seed=as_int(flag("seed"), self.seed, 0, MAX_SEED),
            window=as_int(flag("window"), self.window, 1, MAX_VOTES),
            pool=as_int(flag("pool"), self.pool, 1, MAX_VOTES),
            value_weight=as_number(flag("value_weight"), self.value_weight, MAX_WEIGHT),
            value_votes=None
            if self.value_votes is None
            else as_number(flag("value_votes"), self.value_votes, MAX_WEIGHT),
            vote_every=None
            if self.vote_every is None
            else as_int(flag("vote_every"), self.vote_every, 1, MAX_VOTES),
            decay=as_number(flag("decay"), self.decay, 1, positive=True),
        )

    def sizes(self, max_model_len: int, block_size: int) -> dict[str, int]:
        """Budget, recent and segment in tokens, unchecked; see `resolve`.

        None is larger than the longest request, where nothing is evicted.
        """
        assert self.budget is not None, "sizes() is for enabled policies"
        budget = min(tokens_of(self.budget, max_model_len), max_model_len)
        segment = whole = -(-max_model_len // block_size) * block_size
        if self.segment != SEGMENT_PROMPT:
            segment = min(int(self.segment), whole)
        recent = tokens_of(self.recent, budget)
        return {"budget": budget, "recent": recent, "segment": segment}

    def resolve(self, max_model_len: int, block_size: int) -> ResolvedKVPolicy:
        """Tie the policy to a model: shares become tokens, sizes are checked.

        A budget beyond the longest request is cut to it.

        Args:
            max_model_len: Longest request in tokens.
            block_size: Tokens of one KV-cache block.

        Raises:
            KVPolicyError: When the budget cannot hold the protected tokens and one
                block, or the segment is not a multiple of the block size.

        """
        assert self.budget is not None, "resolve() is for enabled policies"
        assert self.scoring is not None, "from_dict() fills defaults in"
        budget = tokens_of(self.budget, max_model_len)
        recent = tokens_of(self.recent, budget)
        floor = self.sinks + recent + block_size
        if budget < floor:
            raise fail(
                "--kv-budget",
                f"{budget} tokens is smaller than sinks + recent + one block "
                f"({self.sinks} + {recent} + {block_size} = {floor}); use more"
                + (", or smaller blocks: --block-size 32." if block_size > 32 else "."),
            )
        held = min(budget, max_model_len)
        vote_every = self.vote_every or default_vote_every(held)
        value_votes = self.value_votes
        if value_votes is None:
            value_votes = default_value_votes(held)
        if self.scoring == "vote" and recent < vote_every:
            raise fail(
                option_flag("recent"),
                f"{recent} tokens is less than vote_every ({vote_every}), so that "
                "a token could be evicted before any query has voted on it.",
            )
        if self.segment not in (1, SEGMENT_PROMPT) and int(self.segment) % block_size:
            raise fail(
                option_flag("segment"),
                f"{self.segment} is not a multiple of the block size {block_size} "
                f"(nor 1, nor {SEGMENT_PROMPT!r}).",
            )
        return ResolvedKVPolicy(
            **self.sizes(max_model_len, block_size),
            name=self.name,
            scoring=self.scoring,
            hash_bits=self.hash_bits,
            hash_source=self.hash_source,
            orthogonal=self.orthogonal,
            sinks=self.sinks,
            seed=self.seed,
            window=self.window,
            pool=self.pool,
            value_weight=self.value_weight,
            value_votes=value_votes,
            vote_every=vote_every,
            decay=self.decay,
            recent_percent=percent_of(self.recent),
            allow_full=self.allow_full,
        )


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        text = value if isinstance(value, str) else ""
        near = difflib.get_close_matches(text, choices, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {choices}."
        raise fail(option_flag(key), f"unknown value {shown(value)}; {hint}")


def policy_of(additional_config: Any) -> KVPolicyConfig:
    """Read the policy out of vLLM's ``additional_config``; absent means off.

    Raises:
        KVPolicyError: As `KVPolicyConfig.from_dict`.

    """
    if not isinstance(additional_config, Mapping):
        return KVPolicyConfig()
    return KVPolicyConfig.from_dict(additional_config.get(ADDITIONAL_CONFIG_KEY))


def kv_policy(name: str = "hashevict", **options: Any) -> dict[str, dict[str, Any]]:
    """Build vLLM's ``additional_config`` for Python users.

    Example: ``LLM(model, additional_config=kv_policy(budget=1024, segment="prompt"))``.

    Raises:
        KVPolicyError: As `KVPolicyConfig.from_dict`, or when vLLM would not load the
            plugin: it would serve the model without a policy, and without a word.

    """
    options = {"name": name, **options}
    if KVPolicyConfig.from_dict(options).enabled:
        _check_plugin()
    return {ADDITIONAL_CONFIG_KEY: options}


def _check_plugin() -> None:
    """Refuse an environment in which vLLM does not load this plugin.

    As ``load_plugins_by_group`` (vllm/plugins/__init__.py) finds plugins.
    """
    if not any(e.name == PLUGIN for e in entry_points(group=PLUGIN_GROUP)):
        raise fail(
            "kv_policy",
            "the package hashevict-vllm is not installed, so vLLM does not load its "
            "plugin; run pip install in its directory.",
        )
    named = os.environ.get("VLLM_PLUGINS")
    if named is not None and PLUGIN not in named.split(","):
        raise fail(
            "VLLM_PLUGINS",
            f"names {named!r}, so vLLM would serve without the policy; add {PLUGIN} to "
            "it.",
        )
