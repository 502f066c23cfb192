"""A request's own budget: ``kv_budget`` in its ``vllm_xargs``, or ``extra_args``.

Whoever asks for B tokens gets what a server with ``--kv-budget B`` and this server's
``vote_every`` and ``decay`` would give, beside neighbours with budgets of their own.
Front ends refuse what cannot be served (`check_budget`); behind them every value is a
good one (`asked_budget`).
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from hashevict_vllm.config import option_flag
from hashevict_vllm.resolved import UNBOUNDED, ResolvedKVPolicy
from hashevict_vllm.values import as_int, fail

KEY = "kv_budget"
FULL = "full"


def asked_budget(extra_args: Mapping[str, Any] | None) -> int | None:
    """Slots per KV head that a request asks for; None for the server's budget."""
    value = extra_args.get(KEY) if extra_args else None
    if value is None:
        return None
    return UNBOUNDED if value == FULL else int(value)


@functools.lru_cache(maxsize=4096)
def policy_with(policy: ResolvedKVPolicy, budget: int | None) -> ResolvedKVPolicy:
    """The policy of a request that asks for a budget, kept; None for the server's."""
    return policy if budget is None else policy.with_budget(budget)


@functools.lru_cache(maxsize=16)
def least_budget(policy: ResolvedKVPolicy, block_size: int) -> int:
    """The smallest budget that `KVPolicyConfig.resolve` would accept of a server."""

    def is_served(budget: int) -> bool:
        recent = policy.with_budget(budget).recent
        fits = budget >= policy.sinks + recent + block_size
        return fits and (not policy.votes or recent >= policy.vote_every)

    return bisect_left(range(policy.budget), True, key=is_served)


def check_budget(
    policy: ResolvedKVPolicy, block_size: int, value: Any, tokens: int, room: int
) -> None:
    """Refuse a value of ``kv_budget`` that cannot be served.

    Args:
        policy: The server's.
        block_size: Slots of a block.
        value: What the request brings; None for nothing.
        tokens: Most tokens that it may grow to, its prompt among them.
        room: Tokens of one request that the pool can hold uncompressed.

    Raises:
        KVPolicyError: With one sentence for the client.

    """
    if value is None:
        return
    if value == FULL:
        if not policy.allow_full:
            raise fail(
                KEY,
                f"{FULL!r} is not allowed by this server; ask for at most "
                f"{policy.budget} tokens, or start it with "
                f"{option_flag('allow_full')} true.",
            )
        if tokens > room:
            raise fail(
                KEY,
                f"{FULL!r} with a prompt and max_tokens of {tokens} tokens together is "
                f"more than the {room} that the KV cache holds; lower max_tokens.",
            )
        return
    if isinstance(value, str) and not value.strip().isdecimal():
        raise fail(KEY, f"expected tokens or {FULL!r}, got {value[:40]!r}.")
    as_int(KEY, value, least_budget(policy, block_size), policy.budget)
