"""Offline rules by a short name; see `base` for the interface."""

from __future__ import annotations

from hashevict_vllm.eval.offline.rules.base import Full, PromptOnly, Rule
from hashevict_vllm.eval.offline.rules.expected_attention import ExpectedAttention
from hashevict_vllm.eval.offline.rules.fastgen import FastGen
from hashevict_vllm.eval.offline.rules.h2o import H2O, ObservedAttention
from hashevict_vllm.eval.offline.rules.scissorhands import Scissorhands
from hashevict_vllm.eval.offline.rules.snapkv import SnapKV, SnapKVPress
from hashevict_vllm.eval.offline.rules.tova import TOVA
from hashevict_vllm.eval.offline.rules.vote import (
    CosineVoteRule,
    ExactVoteRule,
    HammingVoteRule,
    VoteRule,
)

RULES: dict[str, type[Rule]] = {
    "vote": VoteRule,
    "vote-exact": ExactVoteRule,
    "vote-cosine": CosineVoteRule,
    "vote-hamming": HammingVoteRule,
    "h2o": H2O,
    "observed-attention": ObservedAttention,
    "scissorhands": Scissorhands,
    "fastgen": FastGen,
    "snapkv": SnapKV,
    "snapkv-press": SnapKVPress,
    "tova": TOVA,
    "expected-attention": ExpectedAttention,
}
"""What ``--rules`` takes."""

__all__ = ["RULES", "Full", "PromptOnly", "Rule", "VoteRule"]
