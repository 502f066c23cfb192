"""Methods of kvpress 0.5.5 as rules: what they keep of a prompt is kvpress's own code.

kvpress prunes at the prompt's end; in decode only every so many tokens, after
attention (its ``DecodingPress``). The budget in between, where a new token has to push
out another before it attends, is `PromptOnly`'s.
"""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar

import torch

from hashevict_vllm.config import KVPolicyError
from hashevict_vllm.eval.offline.model import PromptLayer
from hashevict_vllm.eval.offline.rules.base import PromptOnly
from hashevict_vllm.eval.offline.slots import Slots, Step


class Press(PromptOnly):
    """A ``ScorerPress`` of kvpress, with its defaults but for `settings`.

    Raises:
        KVPolicyError: Without kvpress, which needs older transformers than vLLM does.

    """

    press: ClassVar[str]
    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, budget: int) -> None:
        super().__init__(budget)
        if importlib.util.find_spec("kvpress") is None:
            raise KVPolicyError(
                f"--rules: {self.label} is kvpress's, which is not installed here; "
                "use scripts/evaluate-offline, which makes an environment that has it."
            )

    def score(self, prompt: PromptLayer) -> torch.Tensor:
        """See `PromptOnly.score`."""
        import kvpress

        # In the model's dtype, as kvpress finds keys in its cache.
        k, v = (x.to(prompt.hidden.dtype)[None] for x in (prompt.k, prompt.v))
        attention = prompt.everything.flatten(0, 1)[None]
        press = getattr(kvpress, self.press)(**self.settings)
        with torch.no_grad():
            found = press.score(prompt.module, prompt.hidden, k, v, attention, {})
        return found[0].float()


class SnapKV(Press):
    """SnapKV (Li et al., arXiv 2404.14469): the prompt's last queries vote.

    Window and kernel of the paper's LongBench setting. It pools by the maximum there;
    kvpress knows means only.
    """

    label = "SnapKV of kvpress, window 32 (offline)"
    press = "SnapKVPress"
    settings: ClassVar[dict[str, Any]] = {"window_size": 32, "kernel_size": 7}


class SnapKVPress(Press):
    """kvpress's defaults for it: window 64, pooled over 5."""

    label = "SnapKV of kvpress (offline)"
    press = "SnapKVPress"


class ExpectedAttention(Press):
    """Expected Attention (Devoto et al., arXiv 2510.00636)."""

    label = "Expected Attention (offline)"
    press = "ExpectedAttentionPress"


class ObservedAttention(Press):
    """What kvpress has for H2O: mean attention by the queries that saw a token."""

    label = "ObservedAttention (offline)"
    press = "ObservedAttentionPress"


class TOVA(Press):
    """TOVA (Oren et al., arXiv 2401.06104): the least attended by the last query goes.

    All heads keep the same tokens. The paper evicts after attention; here what the last
    query thought decides before the next one attends, so that the budget holds.
    """

    label = "TOVA (offline)"
    press = "TOVAPress"
    sinks = 0

    def after(self, slots: Slots, weights: torch.Tensor, step: Step) -> None:
        """Only the last query counts."""
        slots.stat.copy_(weights.mean(dim=(1, 2))[:, None].expand_as(slots.stat))
