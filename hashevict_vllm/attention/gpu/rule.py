"""What the Triton kernels know of a policy; made once at start."""

from __future__ import annotations

from hashevict_vllm.config import KVPolicyError
from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.triton.rule import DeviceRule, make_salt
from hashevict_vllm.policies import make_rule
from hashevict_vllm.policies.vote import estimate_scale
from hashevict_vllm.resolved import VOTE_HORIZON, ResolvedKVPolicy


def device_rule(policy: ResolvedKVPolicy) -> DeviceRule:
    """The policy in the integers that kernels are compiled for.

    Raises:
        KVPolicyError: For a rule that has no GPU kernel.

    """
    rule = make_rule(policy)
    if rule.kernel_code == codes.KEY_DIFF:
        raise KVPolicyError(
            "--kv-policy: key_diff reads every live key at every step and is served on "
            "CPUs only; choose hashevict or another baseline."
        )
    return DeviceRule(
        kind=rule.kernel_code,
        words=rule.words,
        bits=rule.projected_bits,
        sinks=policy.sinks,
        salt=make_salt(policy.seed),
        budget=policy.budget,
        segment=policy.segment,
        window=policy.window if policy.votes else 0,
        every=policy.vote_every,
        horizon=VOTE_HORIZON,
        pool=policy.pool,
    )


def vote_factor(policy: ResolvedKVPolicy, head_dim: int) -> float:
    """What estimates of hashed rests are multiplied with; see `estimate_scale`."""
    if not policy.votes:
        return 0.0
    return estimate_scale(policy.hash_bits, head_dim, policy.orthogonal)
