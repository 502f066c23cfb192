"""Rules: what is evicted. One rule per file; see `base` for the interface."""

from __future__ import annotations

from hashevict_vllm.config import KVPolicyError
from hashevict_vllm.policies.base import EvictionRule
from hashevict_vllm.policies.hashevict import InstantHamming
from hashevict_vllm.policies.key_diff import KeyDiff
from hashevict_vllm.policies.l2_norm import L2Norm
from hashevict_vllm.policies.random import Random
from hashevict_vllm.policies.streaming_llm import StreamingLLM
from hashevict_vllm.policies.vote import Vote
from hashevict_vllm.resolved import ResolvedKVPolicy

RULES: dict[tuple[str, str], type[EvictionRule]] = {
    ("hashevict", "instant"): InstantHamming,
    ("hashevict", "vote"): Vote,
    ("streaming_llm", "recency"): StreamingLLM,
    ("l2_norm", "norm"): L2Norm,
    ("key_diff", "cosine"): KeyDiff,
    ("random", "random"): Random,
}
"""(policy name, scoring) to rule. ``full`` has none: it is stock vLLM."""


def make_rule(policy: ResolvedKVPolicy) -> EvictionRule:
    """The rule of a resolved policy.

    Raises:
        KVPolicyError: If no rule serves this policy and scoring.

    """
    try:
        rule = RULES[policy.name, policy.scoring]
    except KeyError:
        raise KVPolicyError(
            f"--kv-policy-config.scoring: {policy.scoring!r} is not a scoring of "
            f"--kv-policy {policy.name}."
        ) from None
    return rule(policy)
