"""Decoding after a shared prefill: every rule and budget in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from hashevict_vllm.eval.offline.model import OfflineModel, Prefill
from hashevict_vllm.eval.offline.rules import Rule
from hashevict_vllm.eval.offline.slots import Slots, Step
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
        layers.append([rule.keep(prompt) for rule in rules])
    return layers


class Decoder:
    """R sequences after one prompt, for every rule; the model is read once per step.

    Args:
        model: The model.
        read: The prompt.
        rules: P rules.
        reduced: What they keep of the prompt.
        copies: R.

    """

    def __init__(
        self,
        model: OfflineModel,
        read: Prefill,
        rules: Sequence[Rule],
        reduced: Reduced,
        copies: int,
    ) -> None:
        self.model, self.rules = model, rules
        self.t = self.prompt_len = len(read.tokens)
        self.slots = [[slots.copies(copies) for slots in layer] for layer in reduced]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Decode int64 [P, R]; returns logits float32 [P, R, V]."""

        def attend(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
        ) -> torch.Tensor:
            q = q[:, :, 0].unflatten(1, (k.shape[1], -1))
            q, k, v = (
                x.float().unflatten(0, tokens.shape)
                for x in (q, k[:, :, 0], v[:, :, 0])
            )
            parts = [
                rule.step(slots, Step(q[i], k[i], v[i], self.t, self.prompt_len, scale))
                for i, (rule, slots) in enumerate(
                    zip(self.rules, self.slots[layer], strict=True)
                )
            ]
            # P times [R, Hkv, G, D] to [P x R, Hq, 1, D].
            return torch.cat(parts).flatten(1, 2)[:, :, None]

        logits = self.model.forward(tokens.reshape(-1, 1), self.t, attend)
        self.t += 1
        return logits.unflatten(0, tokens.shape)


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
    wanted = pad_sequence([torch.tensor(x) for x in continuations], batch_first=True)
    lengths = torch.tensor([len(x) for x in continuations])
    decoder = Decoder(model, read, rules, reduced, len(wanted))
    logits = read.logits.expand(len(rules), len(wanted), -1)
    found = []
    for step, tokens in enumerate(wanted.T):
        if step:
            logits = decoder.step(wanted[:, step - 1].expand(len(rules), -1))
        every = tokens.expand(len(rules), -1)[..., None]
        found.append(logits.log_softmax(-1).gather(-1, every)[..., 0])
    return torch.stack(found, -1) * (torch.arange(wanted.shape[1]) < lengths[:, None])


def generate(
    model: OfflineModel,
    read: Prefill,
    rules: Sequence[Rule],
    reduced: Reduced,
    sample: Sample,
) -> list[Output]:
    """Greedy answers of every rule after the sample's forced opening words."""
    ended = _end(model, sample)
    decoder = Decoder(model, read, rules, reduced, 1)
    logits = read.logits.expand(len(rules), 1, -1)
    answers: list[tuple[list[int], list[float]]] = [([], []) for _ in rules]
    done = [False] * len(rules)
    for token in sample.opening:
        logits = decoder.step(torch.full((len(rules), 1), token))
    for left in reversed(range(sample.free)):
        sure, chosen = logits.log_softmax(-1).max(-1)
        for row, (tokens, logprobs) in enumerate(answers):
            if not done[row]:
                tokens.append(int(chosen[row]))
                logprobs.append(float(sure[row]))
                done[row] = ended(tokens)
        if all(done) or not left:
            break
        logits = decoder.step(chosen)
    return [
        Output(_until(model, sample, tokens), tokens, logprobs)
        for tokens, logprobs in answers
    ]


def answer(model: OfflineModel, sample: Sample, rules: Sequence[Rule]) -> list[Output]:
    """Output of every rule.

    As `hashevict_vllm.eval.engine.answer`: the same requests, scored alike.
    """
    read = model.prefill(sample.prompt)
    reduced = reduce_prompt(model, read, rules, len(sample.prompt))
    outputs = [Output() for _ in rules]
    if sample.free:
        outputs = generate(model, read, rules, reduced, sample)
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
