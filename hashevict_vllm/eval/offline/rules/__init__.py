"""Offline rules by a short name; see `base` for the interface."""

from __future__ import annotations

from hashevict_vllm.eval.offline.rules.base import Full, PromptOnly, Rule
from hashevict_vllm.eval.offline.rules.expected_attention import ExpectedAttention
from hashevict_vllm.eval.offline.rules.fastgen import FastGen
from hashevict_vllm.eval.offline.rules.h2o import H2O, ObservedAttention
from hashevict_vllm.eval.offline.rules.policy import (
    KeyDiff,
    L2Norm,
    Paper,
    PolicyRule,
    Random,
    Reference,
    StreamingLLM,
)
from hashevict_vllm.eval.offline.rules.scissorhands import Scissorhands
from hashevict_vllm.eval.offline.rules.snapkv import SnapKV, SnapKVPress
from hashevict_vllm.eval.offline.rules.tova import TOVA
from hashevict_vllm.eval.offline.rules.vote import (
    CosineVoteRule,
    ExactVoteRule,
    HammingVoteRule,
    VoteRule,
    WholeVoteRule,
)

BASELINES: dict[str, type[Rule]] = {
    "vote": VoteRule,
    "vote-exact": ExactVoteRule,
    "vote-cosine": CosineVoteRule,
    "vote-whole": WholeVoteRule,
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
"""What no engine serves, and our own rule to compare them with."""

SERVED: dict[str, type[Rule]] = {
    "paper": Paper,
    "reference": Reference,
    "streaming_llm": StreamingLLM,
    "l2_norm": L2Norm,
    "key_diff": KeyDiff,
    "random": Random,
}
"""What the engine serves as well; here for attention fidelity."""

RULES = {**BASELINES, **SERVED}
"""What ``--rules`` takes."""

__all__ = ["BASELINES", "RULES", "Full", "PolicyRule", "PromptOnly", "Rule", "VoteRule"]
