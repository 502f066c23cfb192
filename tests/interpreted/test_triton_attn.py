"""The wrapped TRITON_ATTN, interpreted, gives the oracle's outputs."""

from __future__ import annotations

import pytest
import torch

from hashevict_vllm.verify.interpreter import allow_triton

allow_triton()

from support.wrapped import Run, policy_of  # noqa: E402


@pytest.mark.parametrize(
    ("scoring", "segment", "dtype", "slots_first"),
    [
        ("instant", 32, torch.float32, False),
        ("instant", 1, torch.float16, True),
        ("vote", "prompt", torch.float32, True),
    ],
)
def test_prefill_mixed_and_decode_batches_equal_the_oracle(
    scoring: str, segment: int | str, dtype: torch.dtype, slots_first: bool
) -> None:
    Run(policy_of(scoring, segment), 1, 2, dtype, slots_first).check()
