"""Teacher forcing in decode: the log-probability of a given text, token by token.

``prompt_logprobs`` would score tokens while the prompt is read, segment by segment,
where a token still sees all of its own segment. Here the tokens are *generated*: a
logits processor leaves only the wanted token, so that each one takes the decode path
(append or evict, then attend). vLLM computes ``logprobs`` before any processor runs
when ``logprobs_mode`` is ``raw_logprobs``: what is reported is what the model thought.
The same processor forces an answer's opening words and then lets the model go on.

This is the interface of vLLM's model runner V1, the CPU's; runner V2 wants another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FORCED = "forced_token_ids"
"""Key of ``SamplingParams.extra_args``: the first tokens of the output."""

ENGINE_OPTIONS: dict[str, Any] = {
    "logits_processors": ["hashevict_vllm.eval.forcing:ForcedTokens"],
    "logprobs_mode": "raw_logprobs",
}
"""What `LLM` needs for `forced_params`."""


class ForcedTokens(AdapterLogitsProcessor):
    """Makes a request's output begin with the tokens of `FORCED`."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse anything but a list of token ids."""
        forced = (sampling_params.extra_args or {}).get(FORCED)
        if forced is not None and not (
            isinstance(forced, list) and all(isinstance(i, int) for i in forced)
        ):
            raise ValueError(f"{FORCED}: expected a list of token ids, got {forced!r}.")

    def is_argmax_invariant(self) -> bool:
        """Forcing changes what greedy sampling picks."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        """Return the request's own processor, none without forced tokens."""
        forced = (params.extra_args or {}).get(FORCED)
        if not forced:
            return None

        def force(output_ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
            step = len(output_ids)
            if step < len(forced):
                logits.fill_(float("-inf"))
                logits[forced[step]] = 0.0
            return logits

        return force


def forced_params(
    forced: Sequence[int],
    free: int = 0,
    stop: Sequence[str] = (),
    sampling: Mapping[str, Any] | None = None,
    ends: Collection[int] = (),
) -> SamplingParams:
    """Greedy sampling that starts with given tokens and reports log-probabilities.

    Where one of `ends` is forced, as between two turns of a chat, vLLM must not end the
    request there: nor does it then where the free part has one.

    Args:
        forced: First tokens of the output.
        free: Tokens that may follow, of the model's own choice.
        stop: Strings that end the free part.
        sampling: Other keys of `SamplingParams`, such as a temperature.
        ends: Tokens that end a turn.

    """
    return SamplingParams(
        **{"temperature": 0.0, **(sampling or {})},
        max_tokens=len(forced) + free,
        logprobs=0,  # the sampled token's own
        ignore_eos=not free or not set(ends).isdisjoint(forced),
        stop=list(stop),
        detokenize=bool(stop),
        extra_args={FORCED: list(forced)},
    )


def token_logprobs(completion: Any) -> list[float]:
    """Log-probability of every token of a vLLM ``CompletionOutput``."""
    return [
        step[token].logprob
        for token, step in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
