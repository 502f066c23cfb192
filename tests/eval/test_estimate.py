"""The table of estimates' errors, on keys that point anywhere."""

from __future__ import annotations

import pytest
import torch

from hashevict_vllm.eval.estimate import least_error, measure
from hashevict_vllm.eval.offline.model import PromptLayer


@pytest.mark.parametrize(("dim", "bits"), [(64, 64), (128, 64), (64, 128), (256, 64)])
def test_shrinking_brings_the_error_of_random_keys_to_the_least_there_is(
    dim: int, bits: int
) -> None:
    noise = torch.Generator().manual_seed(0)
    q, k = (torch.randn(*n, 400, dim, generator=noise) for n in ((2, 3), (2,)))
    layer = PromptLayer(q, k, k, 0.1, None, torch.empty(0))
    error, shrunk, *kept = measure(layer, bits, seed=0).tolist()
    factor = least_error(bits, dim)
    # An unbiased estimate with the error 1 / factor - 1, and the best multiple of it.
    assert error == pytest.approx(1 / factor - 1, rel=0.15)
    assert shrunk == pytest.approx(1 - factor, rel=0.15)
    assert kept[2] > max(kept[:2])
