"""The float32 oracle: short, obviously right torch code for the eviction rule.

Every kernel and the served engine are tested against this file. It keeps, for one layer
of one request, tensors of the live slots in order of arrival and never thinks about
blocks, pages or slots. Nothing here is fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hashevict_vllm.config import ResolvedKVPolicy
from hashevict_vllm.kernels.projection import WORD_BITS, make_projection, num_words


def signature_bits(x: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Sign bits ``x . r_j >= 0`` (paper, section 3).

    Args:
        x: [..., D], any float dtype.
        projection: float32 [D, b].

    Returns:
        bool [..., b].

    """
    return x.to(torch.float32) @ projection >= 0


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Pack bool [..., b] into int32 words [..., ceil(b / 32)], low bit first."""
    b = bits.shape[-1]
    padded = torch.zeros(*bits.shape[:-1], num_words(b) * WORD_BITS, dtype=torch.int64)
    padded[..., :b] = bits.to(torch.int64)
    weights = 2 ** torch.arange(WORD_BITS, dtype=torch.int64)
    words = (padded.unflatten(-1, (-1, WORD_BITS)) * weights).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def choose_victim(
    distance: torch.Tensor, position: torch.Tensor, t: int, sinks: int, recent: int
) -> torch.Tensor:
    """The slot to overwrite at step t: largest distance, ties to the oldest position.

    Args:
        distance: int64 [H, n], Hamming distance of every live slot.
        position: int64 [H, n], absolute positions, distinct per row.
        t: Position of the new token.
        sinks: Positions below this are protected.
        recent: Positions above ``t - 1 - recent`` are protected.

    Returns:
        int64 [H], index of the victim in each row.

    """
    protected = (position < sinks) | (position > t - 1 - recent)
    # Distances are at most a few thousand, so one integer orders (distance, age).
    key = distance * 2**32 - position
    key[protected] = torch.iinfo(torch.int64).min
    return key.argmax(dim=1)


@dataclass
class ReferenceLayer:
    """One layer's live slots of one request, and the rules that change them.

    Attributes:
        policy: The resolved policy.
        prompt_len: Length of the original prompt in tokens.
        k, v: float32 [Hkv, n, D], live slots in order of arrival.
        bits: bool [Hkv, n, b], signatures of the keys.
        position: int64 [Hkv, n], absolute positions.

    """

    policy: ResolvedKVPolicy
    prompt_len: int
    k: torch.Tensor
    v: torch.Tensor
    bits: torch.Tensor
    position: torch.Tensor
    t: int = 0

    @classmethod
    def empty(
        cls, policy: ResolvedKVPolicy, prompt_len: int, num_kv_heads: int, head_dim: int
    ) -> ReferenceLayer:
        """A layer without live slots."""
        return cls(
            policy=policy,
            prompt_len=prompt_len,
            k=torch.empty(num_kv_heads, 0, head_dim),
            v=torch.empty(num_kv_heads, 0, head_dim),
            bits=torch.empty(num_kv_heads, 0, policy.hash_bits, dtype=torch.bool),
            position=torch.empty(num_kv_heads, 0, dtype=torch.int64),
        )

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of the next T tokens; the live slots are updated.

        Args:
            q: [T, Hq, D] after RoPE.
            k: [T, Hkv, D] after RoPE.
            v: [T, Hkv, D].
            scale: Softmax scale.

        Returns:
            float32 [T, Hq, D]. A prompt must be given whole; how the scheduler cuts it
            is what this oracle does not depend on.

        """
        q, k, v = (x.to(torch.float32) for x in (q, k, v))
        outputs = []
        start, total = self.t, self.t + len(q)
        while self.t < total:
            t = self.t
            if t < self.prompt_len and self.policy.segment > 1:
                end = (t // self.policy.segment + 1) * self.policy.segment
                end = min(end, self.prompt_len)
                rows = slice(t - start, end - start)
                outputs.append(self._segment(q[rows], k[rows], v[rows], scale))
            else:
                row = t - start
                outputs.append(self._decode(q[row], k[row], v[row], scale)[None])
        return torch.cat(outputs)

    def _attend(
        self, q: torch.Tensor, scale: float, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Plain softmax attention: q [T, Hq, D] over the live slots."""
        group = q.shape[1] // self.k.shape[0]
        k = self.k.repeat_interleave(group, dim=0)
        v = self.v.repeat_interleave(group, dim=0)
        logits = torch.einsum("thd,hnd->htn", q, k) * scale
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        return torch.einsum("htn,hnd->thd", logits.softmax(-1), v)

    def _append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add tokens k, v [T, Hkv, D] after the live slots."""
        position = torch.arange(self.t, self.t + len(k)).expand(k.shape[1], -1)
        bits = signature_bits(k, self._projection)
        self.k = torch.cat([self.k, k.transpose(0, 1)], dim=1)
        self.v = torch.cat([self.v, v.transpose(0, 1)], dim=1)
        self.bits = torch.cat([self.bits, bits.transpose(0, 1)], dim=1)
        self.position = torch.cat([self.position, position], dim=1)
        self.t += len(k)

    @property
    def _projection(self) -> torch.Tensor:
        p = self.policy
        return make_projection(self.k.shape[-1], p.hash_bits, p.seed, p.orthogonal)

    def _victim(self, q: torch.Tensor, k: torch.Tensor, t: int, n: int) -> torch.Tensor:
        """Victim among the first n slots for the token (q [Hq, D], k [Hkv, D])."""
        heads = k.shape[0]
        if self.policy.hash_source == "query":
            source = signature_bits(q, self._projection).unflatten(0, (heads, -1))
        else:
            source = signature_bits(k, self._projection)[:, None]
        # [Hkv, G, 1, b] against [Hkv, 1, n, b]; the group's distances are summed.
        differ = source[:, :, None] ^ self.bits[:, None, :n]
        distance = differ.sum(dim=(1, 3))
        return choose_victim(
            distance, self.position[:, :n], t, self.policy.sinks, self.policy.recent
        )

    def _remove(self, victim: torch.Tensor) -> None:
        """Drop one slot (int64 [Hkv]) of every head."""
        n = self.k.shape[1]
        keep = torch.arange(n).expand(len(victim), n) != victim[:, None]
        self.k = self.k[keep].unflatten(0, (len(victim), n - 1))
        self.v = self.v[keep].unflatten(0, (len(victim), n - 1))
        self.bits = self.bits[keep].unflatten(0, (len(victim), n - 1))
        self.position = self.position[keep].unflatten(0, (len(victim), n - 1))

    def _decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Design 1.2: evict before attention, then attend. q [Hq, D], k, v [Hkv, D]."""
        n = self.k.shape[1]
        if n == self.policy.budget:
            self._remove(self._victim(q, k, self.t, n))
        self._append(k[None], v[None])
        return self._attend(q[None], scale, None)[0]

    def _segment(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Design 1.3: attend with the whole segment held, then replay the decode rule."""
        live, start, count = self.k.shape[1], self.t, len(q)
        self._append(k, v)
        mask = torch.ones(count, live + count, dtype=torch.bool).tril(live)
        output = self._attend(q, scale, mask)
        n = live
        for i in range(count):
            if n == self.policy.budget:
                # Slots from n on are the segment's later tokens, not yet arrived.
                self._remove(self._victim(q[i], k[i], start + i, n))
            else:
                n += 1
        return output
