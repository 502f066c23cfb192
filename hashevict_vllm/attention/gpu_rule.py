"""What the Triton kernels know of a policy; made once at start."""

from __future__ import annotations

import math

import torch

from hashevict_vllm.config import VOTE_HORIZON, KVPolicyError, ResolvedKVPolicy
from hashevict_vllm.kernels import codes
from hashevict_vllm.kernels.triton.rule import DeviceRule, make_salt
from hashevict_vllm.policies import make_rule


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
        recent=policy.recent,
        salt=make_salt(policy.seed),
        budget=policy.budget,
        segment=policy.segment,
        window=policy.window if policy.votes else 0,
        horizon=VOTE_HORIZON,
        pool=policy.pool,
    )


def make_cosines(rule: DeviceRule, device: torch.device) -> torch.Tensor:
    """cos(pi h / b) for every Hamming distance h: float32 [b + 1] on the device."""
    angles = [math.pi / max(rule.bits, 1) * h for h in range(rule.bits + 1)]
    cosines = torch.tensor(angles, dtype=torch.float64, device="cpu").cos()
    return cosines.to(device=device, dtype=torch.float32)
