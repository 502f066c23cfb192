"""The wrapped xformers backend gives the oracle's outputs."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import torch
import triton

from hashevict_vllm.verify.interpreter import allow_triton

allow_triton()
os.environ["XFORMERS_ENABLE_TRITON"] = "1"  # xformers asks for a GPU otherwise

from support import xformers_reference  # noqa: E402
from support.wrapped import Run, policy_of  # noqa: E402
from xformers.ops.fmha import attn_bias as biases  # noqa: E402
from xformers.ops.fmha import triton_splitk  # noqa: E402
from xformers.ops.fmha.common import Inputs  # noqa: E402

from hashevict_vllm.attention.xformers import calls as xformers_calls  # noqa: E402
from hashevict_vllm.attention.xformers import support as xformers_support  # noqa: E402
from hashevict_vllm.attention.xformers.backend import XformersBackend  # noqa: E402
from hashevict_vllm.verify import kernels  # noqa: E402
from hashevict_vllm.verify.checks import PASSED  # noqa: E402


@pytest.mark.parametrize(
    ("scoring", "segment", "heads", "group", "dtype", "slots_first", "most"),
    [
        ("instant", 32, 2, 2, torch.float32, True, 50),
        ("vote", "prompt", 1, 3, torch.float32, False, 32768),
        ("instant", 1, 2, 1, torch.float16, True, 32768),
    ],
)
def test_prefill_mixed_and_decode_batches_equal_the_oracle(
    scoring: str,
    segment: int | str,
    heads: int,
    group: int,
    dtype: torch.dtype,
    slots_first: bool,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(xformers_reference.SEAM, xformers_reference.attention)
    monkeypatch.setattr(xformers_calls, "SCRATCH_SLOTS", most)
    policy = policy_of(scoring, segment)
    Run(policy, heads, group, dtype, slots_first, inner=XformersBackend).check()


def test_verify_checks_a_layer_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_reference.SEAM, xformers_reference.attention)
    xformers_support.register()
    rule, size = "hashevict (instant, query)", kernels.INTERPRETED
    check = kernels.check_rule(rule, torch.float32, size, "cpu", "CUSTOM")
    assert check.result == PASSED
    assert check.name == "hashevict (instant, query), float32, CUSTOM"


# -- an operator of xformers itself ----------------------------------------------


PAGE = 64
"""Pages are a multiple of this (``BLOCK_N`` of triton_splitk)."""


class SplitK:
    """xformers' triton_splitk for decodes, which are all that it takes; counted.

    Its biases say where keys begin, or in which pages they are; packed keys are pages
    where every request has as many as a page.
    """

    def __init__(self, paged: bool) -> None:
        self.paged = paged
        self.ran: Counter[str] = Counter()

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_bias: Any,
        scale: float,
    ) -> torch.Tensor:
        expected = xformers_reference.attention(query, key, value, attn_bias, scale)
        if type(attn_bias) is not biases.BlockDiagonalMask:
            return expected
        bias = self._bias(attn_bias)
        inputs = Inputs(query, key, value, bias, scale=scale)
        objections = triton_splitk.FwOp.not_supported_reasons(inputs)
        assert objections == ["device=cpu (supported: {'cuda'})"], objections
        output, _ = triton_splitk.FwOp.apply(inputs, needs_gradient=False)
        self.ran[type(bias).__name__] += 1
        return output.view(query.shape)

    def _bias(self, bias: biases.BlockDiagonalMask) -> Any:
        queries = [end - start for start, end in bias.q_seqinfo.intervals()]
        keys = [end - start for start, end in bias.k_seqinfo.intervals()]
        if not self.paged or {*keys} != {PAGE}:
            return biases.BlockDiagonalGappyKeysMask.from_seqlens(
                queries, bias.k_seqinfo.seqstart_py, keys
            )
        padded = biases.BlockDiagonalPaddedKeysMask.from_seqlens(queries, keys[0], keys)
        return padded.make_paged(
            torch.arange(len(keys), dtype=torch.int32)[:, None],
            keys[0],
            biases.PagedBlockDiagonalPaddedKeysMask,
        )


@pytest.mark.skipif(
    triton.__version__ >= "3.9",
    reason="xformers 0.0.35 wants block pointers, which Triton 3.9 has no more",
)
@pytest.mark.parametrize(
    ("prompts", "budget", "kind"),
    [
        ([60, 12, 45], 40, biases.BlockDiagonalGappyKeysMask),
        ([70, 80, 75], PAGE, biases.PagedBlockDiagonalPaddedKeysMask),
    ],
)
def test_an_operator_of_xformers_reads_what_was_gathered(
    prompts: list[int], budget: int, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = SplitK(paged=budget == PAGE)
    monkeypatch.setattr(xformers_reference.SEAM, operator)
    policy = policy_of("instant", 32, budget)
    options = {"prompts": prompts, "inner": XformersBackend}
    Run(policy, 2, 2, torch.float16, True, **options).check()
    assert operator.ran[kind.__name__] > 0
