"""SnapKV (Li et al., arXiv 2404.14469): the prompt's last queries vote."""

from __future__ import annotations

import torch
from torch.nn import functional

from hashevict_vllm.eval.offline.model import PromptLayer
from hashevict_vllm.eval.offline.rules.base import PromptOnly


class SnapKV(PromptOnly):
    """Exact attention of an observation window, pooled; the window itself is kept.

    Window 32, max pooling over 7: the paper's LongBench setting. Pooled per query head,
    then averaged over the group, as kvpress does.
    """

    label = "SnapKV (offline)"
    window = 32
    kernel = 7
    pool_by_max = True

    def score(self, prompt: PromptLayer) -> torch.Tensor:
        """See `PromptOnly.score`."""
        window = min(self.window, len(prompt) - 1)
        votes = prompt.attention(window)[..., :-window].mean(2)
        pool = functional.max_pool1d if self.pool_by_max else functional.avg_pool1d
        votes = pool(votes, self.kernel, 1, self.kernel // 2).mean(1)
        return functional.pad(votes, (0, window), value=votes.max().item() + 1)


class SnapKVPress(SnapKV):
    """The defaults of kvpress 0.5.5: window 64, average pooling over 5."""

    label = "SnapKV of kvpress (offline)"
    window = 64
    kernel = 5
    pool_by_max = False
