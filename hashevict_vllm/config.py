"""KVPolicyConfig: the one place for names, defaults, ranges and validation.

The same keys serve ``--kv-policy-config`` (JSON or dotted form), the
``additional_config={"kv_policy": {...}}`` dict of Python users and the YAML files of
``vllm serve --config``. Nothing here imports vLLM or torch.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hashevict_vllm.resolved import ResolvedKVPolicy

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
    "vote": ("window", "pool", "vote_every", "decay"),
    "instant": ("hash_source",),
}
"""Options that one rule of hashevict alone reads."""

HASHING_POLICIES = ("hashevict",)
"""Policies that keep signatures."""

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


class KVPolicyError(ValueError):
    """A setting that cannot be served; the message is one sentence for the user."""


def _fail(flag: str, reason: str) -> KVPolicyError:
    return KVPolicyError(f"{flag}: {reason}")


def _as_int(flag: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise _fail(flag, f"expected an integer, got {value!r}.")
    try:
        number = int(value)
    except ValueError:
        raise _fail(flag, f"expected an integer, got {value!r}.") from None
    if number < minimum:
        raise _fail(flag, f"must be at least {minimum}, got {number}.")
    return number


def _as_tokens(flag: str, value: Any, minimum: int) -> int | str:
    """A token count, or a share such as ``"25%"`` kept as a string."""
    if isinstance(value, str) and value.strip().endswith("%"):
        text = value.strip()
        try:
            share = float(text[:-1])
        except ValueError:
            raise _fail(
                flag, f"expected tokens or a share like 25%, got {value!r}."
            ) from None
        if not 0 < share <= 100:
            raise _fail(flag, f"a share must lie in (0%, 100%], got {text}.")
        return text
    try:
        return _as_int(flag, value, minimum)
    except KVPolicyError as error:
        if isinstance(value, str) and not value.strip().lstrip("-").isdigit():
            raise _fail(
                flag, f"expected tokens or a share like 25%, got {value!r}."
            ) from None
        raise error


def _as_share(flag: str, value: Any) -> float:
    try:
        share = float(value)
    except (TypeError, ValueError):
        raise _fail(flag, f"expected a number in (0, 1], got {value!r}.") from None
    if not 0 < share <= 1:
        raise _fail(flag, f"must lie in (0, 1], got {share}.")
    return share


def _tokens_of(value: int | str, whole: int) -> int:
    return int(whole * float(value[:-1]) / 100) if isinstance(value, str) else value


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
        recent: The most recent tokens never evicted: tokens, or a share of the
            budget ("25%").
        segment: Prompt tokens held before the live set is reduced to the budget:
            tokens, or ``"prompt"`` for the whole prompt; 1 is token by token.
        seed: Seed of the projection, or of the random policy.
        window: With ``vote``: last queries of a prompt segment that vote.
        pool: With ``vote``: a slot's votes count for this many positions, itself and
            those that follow it (and one before), when a segment is reduced.
        vote_every: With ``vote``: in decode, one token of so many votes.
        decay: With ``vote``: factor on earlier votes at every vote in decode.

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
    vote_every: int = 8
    decay: float = 0.85

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
            raise _fail(
                f"additional_config['{ADDITIONAL_CONFIG_KEY}']",
                f"expected a dict of policy options, got {options!r}.",
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
                raise _fail("--kv-policy-config", f"unknown key {key!r}; {hint}")
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
                    raise _fail(
                        option_flag(key),
                        f"has no effect with --kv-policy {config.name}, which keeps no "
                        "signatures.",
                    )
        config = config._validated()
        for scoring, keys in SCORING_OPTIONS.items():
            for key in keys:
                if key in values and config.enabled and config.scoring != scoring:
                    raise _fail(
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
                raise _fail(
                    "--kv-budget",
                    "needs a policy that bounds the cache; add --kv-policy hashevict.",
                )
            return self
        if self.budget is None:
            raise _fail(
                "--kv-budget",
                f"is required with --kv-policy {self.name}: tokens per KV head, "
                "or a share of max_model_len such as 25%.",
            )
        flag = option_flag
        bits = _as_int(flag("hash_bits"), self.hash_bits, MIN_HASH_BITS)
        if bits > MAX_HASH_BITS or bits % 4:
            raise _fail(
                flag("hash_bits"),
                f"must be a multiple of 4 between {MIN_HASH_BITS} and "
                f"{MAX_HASH_BITS}, got {bits}.",
            )
        segment = self.segment
        if segment != SEGMENT_PROMPT:
            if isinstance(segment, str) and not segment.strip().isdigit():
                raise _fail(
                    flag("segment"),
                    f"expected tokens or {SEGMENT_PROMPT!r}, got {segment!r}.",
                )
            segment = _as_int(flag("segment"), segment, 1)
        if not isinstance(self.orthogonal, bool):
            raise _fail(
                flag("orthogonal"), f"expected true or false, got {self.orthogonal!r}."
            )
        scoring = self.scoring or SCORINGS[self.name][0]
        return dataclasses.replace(
            self,
            scoring=scoring,
            budget=_as_tokens(flag("budget"), self.budget, 1),
            hash_bits=bits,
            sinks=_as_int(flag("sinks"), self.sinks, 0),
            recent=_as_tokens(flag("recent"), self.recent, 0),
            segment=segment,
            seed=_as_int(flag("seed"), self.seed, 0),
            window=_as_int(flag("window"), self.window, 1),
            pool=_as_int(flag("pool"), self.pool, 1),
            vote_every=_as_int(flag("vote_every"), self.vote_every, 1),
            decay=_as_share(flag("decay"), self.decay),
        )

    def resolve(self, max_model_len: int, block_size: int) -> ResolvedKVPolicy:
        """Tie the policy to a model: shares become tokens, sizes are checked.

        Args:
            max_model_len: Longest request in tokens.
            block_size: Tokens of one KV-cache block.

        Raises:
            KVPolicyError: When the budget cannot hold the protected tokens and one
                block, or the segment is not a multiple of the block size.

        """
        assert self.budget is not None, "resolve() is for enabled policies"
        assert self.scoring is not None, "from_dict() fills defaults in"
        budget = _tokens_of(self.budget, max_model_len)
        recent = _tokens_of(self.recent, budget)
        floor = self.sinks + recent + block_size
        if budget < floor:
            raise _fail(
                "--kv-budget",
                f"{budget} tokens is smaller than sinks + recent + one block "
                f"({self.sinks} + {recent} + {block_size} = {floor}).",
            )
        if self.scoring == "vote" and recent < self.vote_every:
            raise _fail(
                option_flag("recent"),
                f"{recent} tokens is less than vote_every ({self.vote_every}), so that "
                "a token could be evicted before any query has voted on it.",
            )
        if self.segment == SEGMENT_PROMPT:
            segment = -(-max_model_len // block_size) * block_size
        else:
            segment = int(self.segment)
            if segment != 1 and segment % block_size:
                raise _fail(
                    option_flag("segment"),
                    f"{segment} is not a multiple of the block size {block_size} "
                    f"(nor 1, nor {SEGMENT_PROMPT!r}).",
                )
        return ResolvedKVPolicy(
            name=self.name,
            budget=budget,
            scoring=self.scoring,
            hash_bits=self.hash_bits,
            hash_source=self.hash_source,
            orthogonal=self.orthogonal,
            sinks=self.sinks,
            recent=recent,
            segment=segment,
            seed=self.seed,
            window=self.window,
            pool=self.pool,
            vote_every=self.vote_every,
            decay=self.decay,
        )


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {choices}."
        raise _fail(option_flag(key), f"unknown value {value!r}; {hint}")


def kv_policy(name: str = "hashevict", **options: Any) -> dict[str, dict[str, Any]]:
    """Build vLLM's ``additional_config`` for Python users.

    Example: ``LLM(model, additional_config=kv_policy(budget=1024, segment="prompt"))``.

    Raises:
        KVPolicyError: As `KVPolicyConfig.from_dict`.

    """
    options = {"name": name, **options}
    KVPolicyConfig.from_dict(options)
    return {ADDITIONAL_CONFIG_KEY: options}
