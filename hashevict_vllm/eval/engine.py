"""The served engine, in this process, and the requests that tasks make of it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hashevict_vllm.eval.tasks.base import Output, Sample


@dataclass(frozen=True)
class EngineOptions:
    """What all engines of a run share.

    Attributes:
        model: Directory of the model.
        dtype: vLLM's ``dtype``.
        batch: Requests at a time.
        kv_gib: Size of the KV pool in GiB; None is what the batch can fill.
        block_size: Tokens of a KV block; a budget holds at least one beside the
            protected tokens, so that small budgets want small blocks.

    """

    model: str
    dtype: str = "auto"
    batch: int = 8
    kv_gib: float | None = None
    block_size: int = 32


@contextlib.contextmanager
def engine(
    options: EngineOptions, policy: dict[str, Any], max_model_len: int
) -> Iterator[Any]:
    """An `LLM` with a policy (``{"name": "full"}`` is stock vLLM); shut down after."""
    import torch
    from vllm import LLM

    from hashevict_vllm.config import kv_policy
    from hashevict_vllm.eval.forcing import ENGINE_OPTIONS

    # On CPUs vLLM binds threads of its own; torch's pool, if it was in use before,
    # would spin on the same cores and slow decode down twentyfold.
    torch.set_num_threads(1)
    llm = LLM(
        options.model,
        dtype=options.dtype,
        max_model_len=max_model_len,
        max_num_seqs=options.batch,
        block_size=options.block_size,
        kv_cache_memory_bytes=_pool_bytes(options, max_model_len),
        enforce_eager=True,
        disable_log_stats=True,
        additional_config=kv_policy(**policy),
        enable_prefix_caching=False,  # in bfloat16 a hit changes rounding
        **ENGINE_OPTIONS,
    )
    try:
        yield llm
    finally:
        shut_down(llm)


def _pool_bytes(options: EngineOptions, max_model_len: int) -> int:
    """Size of the KV pool: as told, or for every request of a batch at its longest."""
    if options.kv_gib is not None:
        return int(options.kv_gib * 2**30)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(options.model).get_text_config()
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    item = 4 if options.dtype == "float32" else 2
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * item
    # One block more per request than it fills, and a tenth for slots' metadata.
    tokens = (options.batch + 1) * (max_model_len + 2 * options.block_size)
    return int(1.1 * token * tokens)


def shut_down(llm: Any) -> None:
    """End an in-process engine, so that this process can start another."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    gc.collect()
    cleanup_dist_env_and_memory(shutdown_ray=False)


def answer(llm: Any, tokenizer: Any, samples: Sequence[Sample]) -> list[Output]:
    """Run the requests of some samples together.

    A sample makes one request for its free answer, if it wants one, and one per
    continuation that is scored.
    """
    from hashevict_vllm.eval.forcing import forced_params, token_logprobs

    ends = turn_ends(llm, tokenizer)
    requests = []
    for sample in samples:
        if sample.free:
            params = forced_params(
                sample.opening, sample.free, sample.stop, sample.sampling, ends
            )
            requests.append((sample.prompt, params))
        for continuation in sample.forced:
            requests.append((sample.prompt, forced_params(continuation.tokens)))
    results = iter(
        llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            [params for _, params in requests],
            use_tqdm=False,
        )
    )
    outputs = []
    for sample in samples:
        text, ids, free, finished = "", [], [], True
        if sample.free:
            completion = next(results).outputs[0]
            skip = len(sample.opening)
            ids = list(completion.token_ids)[skip:]
            free = token_logprobs(completion)[skip:]
            finished = completion.finish_reason == "stop"
            end = next((i for i, token in enumerate(ids) if token in ends), None)
            if end is not None:
                ids, free, finished = ids[: end + 1], free[: end + 1], True
            text = _until(tokenizer.decode(ids, skip_special_tokens=True), sample.stop)
        logprobs = [
            token_logprobs(next(results).outputs[0])[continuation.scored_from :]
            for continuation in sample.forced
        ]
        outputs.append(Output(text, ids, free, logprobs, finished))
    return outputs


def turn_ends(llm: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: the tokenizer's, and the generation config's."""
    config = llm.llm_engine.vllm_config.model_config.try_get_generation_config()
    ends = config.get("eos_token_id") or []
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}


def _until(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    for end in stop:
        text = text.partition(end)[0]
    return text
