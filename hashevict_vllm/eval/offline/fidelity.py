"""Attention fidelity: what a bounded cache does to each layer's attention output.

A prompt and its gold answer are read exactly. Every layer is then replayed on its own,
with the exact queries, keys and values of every token (no error is carried from layer
to layer), and compared at the positions after the prompt:

- *error*: |o - o'| / |o| of the attention output, per query head;
- *mass*: share of the exact attention that falls on live slots;
- *top*: the same of the `TOP` most attended positions' attention.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hashevict_vllm.eval.offline.model import OfflineModel, Prefill
from hashevict_vllm.eval.offline.rules import PolicyRule, Rule
from hashevict_vllm.eval.offline.slots import Slab, Slots
from hashevict_vllm.eval.tasks import TASKS
from hashevict_vllm.eval.tasks.base import Sample

TOP = 64
"""Positions whose attention the recall is about."""

STEPS = 128
"""Positions after the prompt that are looked at, at most."""

MEASURES = ("error", "mass", "top")

Found = dict[str, torch.Tensor]
"""`MEASURES` as float32 [P, L, Hq]: of P rules, means over positions."""


def seeded(kinds: Sequence[type[Rule]], budget: int, seeds: int) -> list[Rule]:
    """Every rule at a budget, those that hash with several projections."""
    rules: list[Rule] = []
    for kind in kinds:
        if issubclass(kind, PolicyRule) and kind.hashes:
            rules += [kind(budget, seed) for seed in range(seeds)]
        else:
            rules.append(kind(budget))
    return rules


def replay(
    model: OfflineModel, read: Prefill, prompt_len: int, rules: Sequence[Rule]
) -> Found:
    """Replay every layer under rules of one budget.

    Args:
        model: The model.
        read: A prompt and what follows it, read exactly.
        prompt_len: Where the prompt ends.
        rules: P rules.

    """
    k, v = (torch.stack(x).float() for x in (read.k, read.v))  # [L, Hkv, N, D]
    q = torch.stack(read.q).float()  # [L, Hkv, G, N, D]
    slab = _slab(model, read, prompt_len, rules, k.shape[2])
    sums: dict[str, Any] = dict.fromkeys(MEASURES, 0.0)
    for t in range(prompt_len, k.shape[2]):
        new_q, new_k, new_v = (
            x.expand(len(rules), *x.shape)
            for x in (q[:, :, :, t], k[:, :, t], v[:, :, t])
        )
        ours = slab.step(new_q, new_k, new_v, t, read.scale)
        logits = q[:, :, :, t, None] @ k[:, :, None, : t + 1].transpose(-1, -2)
        weights = (logits * read.scale).softmax(-1)  # [L, Hkv, G, 1, t + 1]
        exact = (weights @ v[:, :, None, : t + 1])[..., 0, :]
        sums["error"] += (ours - exact).norm(dim=-1) / exact.norm(dim=-1)
        live = slab.position[..., : slab.n]
        for name, wanted in (("mass", weights), ("top", _largest(weights))):
            sums[name] += _share(wanted[:, :, :, 0], live)
    steps = k.shape[2] - prompt_len
    return {name: (total / steps).flatten(2) for name, total in sums.items()}


def _largest(weights: torch.Tensor) -> torch.Tensor:
    """The `TOP` largest of the last dimension, the others 0."""
    found = weights.topk(min(TOP, weights.shape[-1]), dim=-1)
    return torch.zeros_like(weights).scatter_(-1, found.indices, found.values)


def _share(weights: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Share [P, L, Hkv, G] of weights [L, Hkv, G, N] at positions [P, L, Hkv, n]."""
    mask = torch.zeros(*live.shape[:-1], weights.shape[-1])
    mask.scatter_(-1, live, 1.0)
    kept = (mask[..., None, :] @ weights.transpose(-1, -2))[..., 0, :]
    return kept / weights.sum(-1)


def _slab(
    model: OfflineModel,
    read: Prefill,
    prompt_len: int,
    rules: Sequence[Rule],
    length: int,
) -> Slab:
    """The reduced prompt; the layers stand for sequences, R = L."""
    kept: list[list[Slots]] = [[] for _ in rules]
    for index in range(model.num_layers):
        prompt = model.layer(read, index, prompt_len)
        for slots, rule in zip(kept, rules, strict=True):
            slots.append(rule.keep(prompt).slots(prompt.k, prompt.v))
    joined = []
    for layers in kept:
        fields = zip(*(vars(slots).values() for slots in layers), strict=True)
        joined.append(Slots(*(torch.cat(field) for field in fields)))
    return Slab(rules, joined, min(rules[0].budget, length), prompt_len)


class Fidelity:
    """Measurements on disk, one JSON line per rule, budget and sample.

    Args:
        model: The model.
        path: Where they are and go.

    """

    def __init__(self, model: OfflineModel, path: Path) -> None:
        self.model, self.path = model, path
        self.records: list[dict[str, Any]] = []
        if path.exists():
            lines = path.read_text().splitlines()
            self.records = [json.loads(line) for line in lines]
        self.known = {self._key(record) for record in self.records}

    @staticmethod
    def _key(record: dict[str, Any]) -> str:
        names = ("options", "task", "length", "sample_seed", "index")
        return json.dumps([record[name] for name in names], sort_keys=True)

    def run(
        self,
        kinds: Sequence[type[Rule]],
        budgets: Sequence[int],
        tasks: Sequence[str],
        length: int,
        samples: int,
        seed: int,
        projections: int,
    ) -> None:
        """Measure what is not there yet; tasks without a gold answer are left out."""
        every = list(self._samples(tasks, length, samples, seed))
        for key, sample in tqdm(every, unit="sample"):
            read = None
            for budget in budgets:
                pairs = [
                    (rule, {**key, "options": rule.options})
                    for rule in seeded(kinds, budget, projections)
                ]
                pairs = [x for x in pairs if self._key(x[1]) not in self.known]
                if not pairs:
                    continue
                gold = sample.forced[0].tokens[:STEPS]
                read = read or self.model.prefill(sample.prompt + gold)
                rules = [rule for rule, _ in pairs]
                found = replay(self.model, read, len(sample.prompt), rules)
                self._add(pairs, found)

    def _samples(
        self, tasks: Sequence[str], length: int, samples: int, seed: int
    ) -> Iterator[tuple[dict[str, Any], Sample]]:
        for task in tasks:
            if TASKS[task].uses_reference:
                continue
            tokenizer = self.model.tokenizer
            for sample in TASKS[task].samples(samples, length, seed, tokenizer):
                key = {"task": task, "length": length, "sample_seed": seed}
                yield {**key, "index": sample.index}, sample

    def _add(self, pairs: Sequence[tuple[Rule, dict[str, Any]]], found: Found) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            for i, (rule, key) in enumerate(pairs):
                rounded = {
                    name: [[round(x, 4) for x in heads] for heads in values[i].tolist()]
                    for name, values in found.items()
                }
                record = {**key, "rule": rule.label, "budget": rule.budget, **rounded}
                file.write(json.dumps(record) + "\n")
                self.records.append(record)
                self.known.add(self._key(record))
