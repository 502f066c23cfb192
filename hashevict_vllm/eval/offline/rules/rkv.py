"""R-KV (Cai et al., arXiv 2505.24133): importance less redundancy, for reasoning."""

from __future__ import annotations

import torch

from hashevict_vllm.eval.offline.rules.last_queries import LastQueries, importance

IMPORTANCE = 0.1
"""The paper's lambda: importance's share of the merit."""

ALIKE = 0.5
"""Cosine from which on keys say the same; the newest of those stays unpunished."""


class RKV(LastQueries):
    """The token goes that is attended to least and is most like the others.

    Merit (the paper's section 3.3): lambda importance - (1 - lambda) redundancy. A
    key's redundancy is its mean cosine with the other keys, through a softmax over
    tokens. For every key the newest one alike does not count (the authors' code: one
    of the last, `retain_direction` "last"). They compress every 128 tokens; here every
    token pushes out one.
    """

    label = "R-KV (offline)"

    def merit(self, seen: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """See `LastQueries.merit`."""
        return IMPORTANCE * importance(seen) - (1 - IMPORTANCE) * redundancy(k)


def redundancy(k: torch.Tensor) -> torch.Tensor:
    """Redundancy of keys.

    Args:
        k: [.., n, D], in the order of their positions.

    Returns:
        float32 [.., n], 1 in sum.

    """
    unit = torch.nn.functional.normalize(k, dim=-1)
    cosine = unit @ unit.transpose(-1, -2)
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    place = torch.arange(k.shape[-2]).expand_as(cosine)
    newest = place.masked_fill(cosine <= ALIKE, -1).amax(-1, keepdim=True)
    cosine.masked_fill_(place == newest, 0.0)
    return cosine.mean(-2).softmax(-1)
