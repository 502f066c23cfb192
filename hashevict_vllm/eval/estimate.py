"""How well the vote rule guesses logits, per model: ``python -m ...eval.estimate``.

Prompts of prose are read exactly. The logits that their last queries have on every
earlier slot but the sinks are set against what `hashevict_vllm.policies.vote` makes of
the slots' descriptions.

- *Error*: variance of the guess's error over the slots of a query (what all slots
  share is no error, since softmax does not see it), in units of the variance of the
  logits; sums over the queries and heads of a layer.
- *Shrunk*: the same with the hashed part times `least_error`.
- *Kept*: share of the true attention that falls on the half of the slots with the most
  votes, by the guess, by the shrunk guess and by exact logits: what an error costs the
  choice of slots.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hashevict_vllm.eval.offline.model import OfflineModel, PromptLayer

SINKS, WINDOW = 4, 16
"""Defaults of `hashevict_vllm.config.KVPolicyConfig`."""
BITS = (64, 128)
HEAD = (
    "| model | head_dim | bits | error, median [least, most] of layers | shrunk "
    "| kept: votes / shrunk / exact |"
)


def least_error(hash_bits: int, head_dim: int) -> float:
    """Factor on the hashed part that makes the error least where nothing is known.

    For orthogonal columns and keys that point anywhere: the variance of q . r, one
    part in D, over itself and the estimate's own, (pi / 2 - min(1, b / D)) / b.
    """
    noise = (math.pi / 2 - min(1.0, hash_bits / head_dim)) / hash_bits
    return 1 / (1 + head_dim * noise)


def measure(layer: PromptLayer, bits: int, seed: int) -> torch.Tensor:
    """Errors and shares of one layer of one prompt.

    Returns:
        float32 [5]: error, shrunk error; attention kept by votes, shrunk, exact.

    """
    from hashevict_vllm.kernels.projection import make_projection
    from hashevict_vllm.kernels.signature import signature_bits
    from hashevict_vllm.policies.frame import KeyFrame
    from hashevict_vllm.policies.vote import attention_of, estimate_scale

    slots, dim = slice(SINKS, len(layer) - WINDOW), layer.k.shape[2]
    projection = make_projection(dim, bits, seed, orthogonal=True)
    frame = KeyFrame.of(layer.k, SINKS)
    described = frame.describe(layer.k[:, slots])
    q = layer.q[:, :, -WINDOW:].flatten(1, 2) * layer.scale
    along, rest = frame.split(q)
    signs = signature_bits(described.rest, projection).float() * 2 - 1
    c = estimate_scale(bits, dim, orthogonal=True)
    hashed = (rest @ projection) @ signs.transpose(1, 2) * c
    hashed *= described.length[:, None]
    axes = along @ described.along.transpose(1, 2)
    logits = q @ layer.k[:, slots].transpose(1, 2)
    guesses = (axes + hashed, axes + least_error(bits, dim) * hashed, logits)
    variance = logits.var(-1).sum()
    errors = [(guess - logits).var(-1).sum() / variance for guess in guesses[:2]]
    exact = attention_of(logits)
    group = layer.q.shape[1]
    kept = []
    for guess in guesses:
        votes = attention_of(guess).unflatten(1, (group, WINDOW)).amax(1).sum(1)
        half = votes.topk(votes.shape[-1] // 2, -1).indices
        chosen = half[:, None].expand(-1, exact.shape[1], -1)
        kept.append(exact.gather(-1, chosen).sum(-1).mean())
    return torch.stack([*errors, *kept])


def layers_of(
    model: OfflineModel, length: int, samples: int, seed: int
) -> Iterator[tuple[int, PromptLayer]]:
    """Full-attention layers of some prompts of prose, read exactly."""
    from hashevict_vllm.eval.tasks import TASKS

    prose = TASKS["summarisation/prose"]
    config = model.model.config.get_text_config()
    every = ["full_attention"] * model.num_layers
    kinds = getattr(config, "layer_types", None) or every
    for sample in prose.samples(samples, length, seed, model.tokenizer):
        read = model.prefill(sample.prompt + sample.forced[0].tokens)
        for index, kind in enumerate(kinds):
            if kind == "full_attention":
                yield index, model.layer(read, index, length)


def rows_of(name: str, length: int, samples: int, seed: int) -> list[str]:
    """Rows of one model; errors are means over its prompts."""
    from transformers import AutoTokenizer

    from hashevict_vllm.eval.offline.model import OfflineModel
    from hashevict_vllm.models import find_model

    path = str(find_model(name))
    tokenizer = AutoTokenizer.from_pretrained(path, model_max_length=1 << 30)
    found: dict[int, dict[int, list[torch.Tensor]]] = {bits: {} for bits in BITS}
    dim = 0
    for index, layer in layers_of(OfflineModel(path, tokenizer), length, samples, seed):
        dim = layer.k.shape[2]
        for bits in BITS:
            found[bits].setdefault(index, []).append(measure(layer, bits, seed))
    rows = []
    for bits in BITS:
        layers = torch.stack([torch.stack(x).mean(0) for x in found[bits].values()])
        error, shrunk = (_spread(column) for column in layers.T[:2])
        kept = " / ".join(f"{100 * share:.1f} %" for share in layers.mean(0)[2:])
        rows.append(f"| {name} | {dim} | {bits} | {error} | {shrunk} | {kept} |")
    return rows


def _spread(x: torch.Tensor) -> str:
    return f"{x.median():.2f} [{x.min():.2f}, {x.max():.2f}]"


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    made = argparse.ArgumentParser(
        prog="python -m hashevict_vllm.eval.estimate",
        description="Error of estimated logits, by model.",
    )
    made.add_argument("--models", nargs="+", default=["SmolLM2-135M-Instruct"])
    made.add_argument("--length", type=int, default=512, help="tokens per prompt")
    made.add_argument("--samples", type=int, default=6, help="prompts per model")
    made.add_argument("--seed", type=int, default=0)
    options = made.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(HEAD, "|---" * HEAD.count("| ") + "|", sep="\n")
    for name in options.models:
        rows = rows_of(name, options.length, options.samples, options.seed)
        print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
