"""Offline rules by a short name; see `base` for the interface."""

from __future__ import annotations

from hashevict_vllm.eval.offline.rules import press, vote
from hashevict_vllm.eval.offline.rules.base import Full, PromptOnly, Rule
from hashevict_vllm.eval.offline.rules.h2o import H2O
from hashevict_vllm.eval.offline.rules.last_queries import LastQueries
from hashevict_vllm.eval.offline.rules.rkv import RKV
from hashevict_vllm.eval.offline.rules.scissorhands import Scissorhands

RULES: dict[str, type[Rule]] = {
    "vote": vote.VoteRule,
    "vote-exact": vote.ExactVoteRule,
    "vote-cosine": vote.CosineVoteRule,
    "vote-whole": vote.WholeVoteRule,
    "vote-hamming": vote.HammingVoteRule,
    "h2o": H2O,
    "snapkv-every-token": LastQueries,
    "r-kv": RKV,
    "scissorhands": Scissorhands,
    "observed-attention": press.ObservedAttention,
    "snapkv": press.SnapKV,
    "snapkv-press": press.SnapKVPress,
    "tova": press.TOVA,
    "expected-attention": press.ExpectedAttention,
}
"""What no engine serves, and our own rule to compare them with: ``--rules``."""

__all__ = ["RULES", "Full", "PromptOnly", "Rule"]
