"""Decoding after a shared prefill: every rule and budget in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hashevict_vllm.eval.offline.model import OfflineModel, Prefill
from hashevict_vllm.eval.offline.rules import Rule
from hashevict_vllm.eval.offline.slots import Slab, Slots
from hashevict_vllm.eval.tasks.base import Output, Sample

Reduced = list[list[Slots]]
"""Per layer and rule, the slots that are kept of a prompt, R = 1."""


def reduce_prompt(
    model: OfflineModel, read: Prefill, rules: Sequence[Rule], length: int
) -> Reduced:
    """Apply every rule to the first `length` tokens of a prefill, layer by layer."""
    layers = []
    for index in range(model.num_layers):
        prompt = model.layer(read, index, length)
        layers.append([rule.keep(prompt).slots(prompt.k, prompt.v) for rule in rules])
    return layers


class Decoder:
    """R sequences after one prompt, for every rule.

    Args:
        model: The model.
        read: The prompt.
        rules: P rules, those of one budget side by side.
        reduced: What they keep of the prompt.
        copies: R.
        steps: Tokens that will be decoded at most.

    """

    def __init__(
        self,
        model: OfflineModel,
        read: Prefill,
        rules: Sequence[Rule],
        reduced: Reduced,
        copies: int,
        steps: int,
    ) -> None:
        self.model, self.copies, self.rules = model, copies, rules
        self.t = len(read.tokens)
        budgets = [rule.budget for rule in rules]
        starts = [
            i for i in range(len(rules)) if i == 0 or budgets[i] != budgets[i - 1]
        ]
        self.spans = [
            slice(start, stop)
            for start, stop in zip(starts, [*starts[1:], len(rules)], strict=True)
        ]
        self.slabs = [
            [
                Slab(
                    rules[span],
                    [_copied(slots, copies) for slots in layer[span]],
                    min(budgets[span.start], self.t + steps),
                    self.t,
                )
                for span in self.spans
            ]
            for layer in reduced
        ]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Decode int64 [P, R]; returns logits float32 [P, R, V]."""
        count = len(self.rules)

        def attend(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
        ) -> torch.Tensor:
            heads = k.shape[1]
            q = q[:, :, 0].float().unflatten(1, (heads, -1))
            q, k, v = (
                x.unflatten(0, (count, -1)) for x in (q, k[:, :, 0].float(), v[:, :, 0])
            )
            parts = [
                slab.step(q[span], k[span], v[span].float(), self.t, scale)
                for slab, span in zip(self.slabs[layer], self.spans, strict=True)
            ]
            # [P, R, Hkv, G, D] to [N, Hq, 1, D].
            return torch.cat(parts).flatten(0, 1).flatten(1, 2)[:, :, None]

        logits = self.model.forward(tokens.reshape(-1, 1), self.t, attend)
        self.t += 1
        return logits.unflatten(0, tokens.shape)


def _copied(slots: Slots, copies: int) -> Slots:
    return Slots(
        *(field.expand(copies, *field.shape[1:]) for field in vars(slots).values())
    )


def force(
    model: OfflineModel,
    read: Prefill,
    rules: Sequence[Rule],
    reduced: Reduced,
    continuations: Sequence[list[int]],
) -> torch.Tensor:
    """Log-probabilities of given continuations.

    Returns:
        float32 [P, R, n], n the length of the longest; 0 beyond the others' ends.

    """
    longest = max(map(len, continuations))
    wanted = torch.zeros(len(continuations), longest, dtype=torch.int64)
    mask = torch.zeros(len(continuations), longest, dtype=torch.bool)
    for row, tokens in enumerate(continuations):
        wanted[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = True
    count, copies = len(rules), len(continuations)
    decoder = Decoder(model, read, rules, reduced, copies, longest)
    logits = read.logits.expand(count, copies, -1)
    found = []
    for step in range(longest):
        every = wanted[:, step].expand(count, -1)
        found.append(logits.log_softmax(-1).gather(-1, every[..., None])[..., 0])
        if step + 1 < longest:
            logits = decoder.step(every)
    return torch.stack(found, -1) * mask


def generate(
    model: OfflineModel,
    read: Prefill,
    rules: Sequence[Rule],
    reduced: Reduced,
    opening: list[int],
    free: int,
    ended: Callable[[list[int]], bool],
) -> list[tuple[list[int], list[float]]]:
    """Greedy answers after forced opening words.

    Args:
        model: The model.
        read: The prompt.
        rules: The rules.
        reduced: What they keep of the prompt.
        opening: Forced first tokens.
        free: Tokens that may follow.
        ended: Whether an answer is complete.

    Returns:
        Per rule, the tokens of the answer without its opening, and their
        log-probabilities.

    """
    steps = len(opening) + free
    decoder = Decoder(model, read, rules, reduced, 1, steps)
    logits = read.logits.expand(len(rules), 1, -1)
    answers: list[tuple[list[int], list[float]]] = [([], []) for _ in rules]
    done = [False] * len(rules)
    for step in range(steps):
        if step < len(opening):
            chosen = torch.full((len(rules), 1), opening[step])
        else:
            chosen = logits.argmax(-1)
            sure = logits.log_softmax(-1).gather(-1, chosen[..., None]).flatten()
            for row, (tokens, logprobs) in enumerate(answers):
                if not done[row]:
                    tokens.append(int(chosen[row, 0]))
                    logprobs.append(float(sure[row]))
                    done[row] = ended(tokens)
        if all(done) or step + 1 == steps:
            break
        logits = decoder.step(chosen)
    return answers


def answer(model: OfflineModel, sample: Sample, rules: Sequence[Rule]) -> list[Output]:
    """Output of every rule; those of one budget must stand side by side.

    As `hashevict_vllm.eval.engine.answer`: the same requests, scored alike.
    """
    read = model.prefill(sample.prompt)
    reduced = reduce_prompt(model, read, rules, len(sample.prompt))
    outputs = [Output() for _ in rules]
    if sample.free:
        found = generate(
            model,
            read,
            rules,
            reduced,
            sample.opening,
            sample.free,
            _end(model, sample),
        )
        outputs = [
            Output(_until(model, sample, tokens), tokens, logprobs)
            for tokens, logprobs in found
        ]
    if sample.forced:
        tokens = [continuation.tokens for continuation in sample.forced]
        forced = force(model, read, rules, reduced, tokens)
        for output, of_rule in zip(outputs, forced.tolist(), strict=True):
            output.logprobs.extend(
                values[continuation.scored_from : len(continuation.tokens)]
                for continuation, values in zip(sample.forced, of_rule, strict=True)
            )
    return outputs


def _end(model: OfflineModel, sample: Sample) -> Callable[[list[int]], bool]:
    """Whether an answer is complete: end of text, or a stop string."""
    eos = model.model.generation_config.eos_token_id
    ends = set(eos) if isinstance(eos, list) else {eos}

    def ended(tokens: list[int]) -> bool:
        if tokens[-1] in ends:
            return True
        text = model.tokenizer.decode(tokens) if sample.stop else ""
        return any(stop in text for stop in sample.stop)

    return ended


def _until(model: OfflineModel, sample: Sample, tokens: list[int]) -> str:
    """Text of an answer up to the first stop string."""
    text = model.tokenizer.decode(tokens, skip_special_tokens=True)
    for stop in sample.stop:
        text = text.partition(stop)[0]
    return text
