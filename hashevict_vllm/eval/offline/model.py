"""A transformers model whose attention is ours, and prompts read exactly with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

_ATTENTION = "hashevict_offline"

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(layer, q [N, Hq, T, D], k, v [N, Hkv, T, D], scale) to [N, Hq, T, D]."""


@dataclass
class PromptLayer:
    """What one layer made of a prompt: all that a rule may judge it by.

    Attributes:
        q: float32 [Hkv, G, T, D], after RoPE.
        k: float32 [Hkv, T, D], after RoPE.
        v: float32 [Hkv, T, D].
        scale: Softmax scale.
        module: The attention module of transformers.
        hidden: What it was given, [1, T, E] in the model's dtype.
        memo: What rules have computed and share between budgets.

    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    module: Any
    hidden: torch.Tensor
    memo: dict[Any, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.k.shape[1]

    def attention(self, window: int) -> torch.Tensor:
        """Exact causal attention of the last queries; float32 [Hkv, G, window, T]."""
        n = len(self)
        logits = self.q[:, :, n - window :] @ self.k[:, None].transpose(2, 3)
        future = torch.ones(window, n, dtype=torch.bool).triu(n - window + 1)
        return logits.mul_(self.scale).masked_fill_(future, float("-inf")).softmax(-1)

    @cached_property
    def everything(self) -> torch.Tensor:
        """Exact causal attention of all queries; float32 [Hkv, G, T, T]."""
        return self.attention(len(self))

    @cached_property
    def received(self) -> torch.Tensor:
        """Attention that every token got from all queries; float32 [Hkv, T]."""
        return self.everything.sum(dim=(1, 2))


@dataclass
class Prefill:
    """A prompt read exactly.

    Attributes:
        tokens: Its ids.
        logits: float32 [V], of the first token after it.
        q: Per layer, [Hkv, G, T, D] in the model's dtype.
        k: Per layer, [Hkv, T, D].
        v: Per layer, [Hkv, T, D].
        scale: Softmax scale.
        hidden: Per layer, what its attention was given, [1, T, E].

    """

    tokens: list[int]
    logits: torch.Tensor
    q: list[torch.Tensor]
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    scale: float
    hidden: list[torch.Tensor]


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    dropout: float = 0.0,
    scaling: float = 1.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for every layer: one function for all our models."""
    output = module.offline_model.attend(module.layer_idx, query, key, value, scaling)
    return output.transpose(1, 2).to(query.dtype), None


class OfflineModel:
    """A causal language model of transformers, run on the CPU.

    Args:
        path: Directory of the model.
        tokenizer: Its tokenizer.
        dtype: ``auto`` (the model's own) or a name of torch's.

    """

    def __init__(self, path: str, tokenizer: Any, dtype: str = "auto") -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self.tokenizer = tokenizer
        self.attend: Attend | None = None
        # Registered first: transformers refuses names that it does not know.
        AttentionInterface.register(_ATTENTION, _attention)
        self.model.set_attn_implementation(_ATTENTION)
        self.modules = [layer.self_attn for layer in self.model.model.layers]
        for module in self.modules:
            module.offline_model = self
            # Some methods of kvpress look for it there.
            module.rotary_emb = self.model.model.rotary_emb
        self.num_layers = len(self.modules)

    @torch.no_grad()
    def forward(self, ids: torch.Tensor, start: int, attend: Attend) -> torch.Tensor:
        """Logits after the last of some tokens.

        Args:
            ids: int64 [N, T].
            start: Position of the first.
            attend: Attention of every layer.

        Returns:
            float32 [N, V].

        """
        self.attend = attend
        output = self.model(
            ids,
            position_ids=torch.arange(start, start + ids.shape[1])[None],
            attention_mask={"full_attention": None, "sliding_attention": None},
            use_cache=False,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def prefill(self, tokens: list[int]) -> Prefill:
        """Read a prompt with exact causal attention and keep every q, k and v."""
        read = Prefill(tokens, torch.empty(0), [], [], [], 1.0, [])

        def attend(
            _: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
        ) -> torch.Tensor:
            read.q.append(q[0].unflatten(0, (k.shape[1], -1)))
            read.k.append(k[0])
            read.v.append(v[0])
            read.scale = scale
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            )

        def see(_: Any, args: Any, named: dict[str, Any]) -> None:
            read.hidden.append(named["hidden_states"])

        hooks = [
            module.register_forward_pre_hook(see, with_kwargs=True)
            for module in self.modules
        ]
        try:
            read.logits = self.forward(torch.tensor([tokens]), 0, attend)[0]
        finally:
            for hook in hooks:
                hook.remove()
        return read

    def layer(self, read: Prefill, index: int, length: int) -> PromptLayer:
        """One layer's view of the first `length` tokens of a prefill."""
        return PromptLayer(
            read.q[index][:, :, :length].float(),
            read.k[index][:, :length].float(),
            read.v[index][:, :length].float(),
            read.scale,
            self.modules[index],
            read.hidden[index][:, :length],
        )
