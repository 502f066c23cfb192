"""The real vLLM engine, in this process: deterministic and quick to start."""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

MAX_MODEL_LEN = 4096


@contextlib.contextmanager
def engine(
    model: Path | str, policy: dict[str, Any] | None = None, **overrides: Any
) -> Iterator[Any]:
    """An `LLM` with the policy, float32 and one request at a time unless overridden."""
    from vllm import LLM

    from hashevict_vllm.config import kv_policy
    from hashevict_vllm.eval.engine import shut_down

    options: dict[str, Any] = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": MAX_MODEL_LEN,
        "block_size": 32,
        "max_num_seqs": 1,
        "kv_cache_memory_bytes": 64 << 20,
        "disable_log_stats": True,
        # Tests of prefix caching switch it on: others repeat prompts and poison pools.
        "enable_prefix_caching": False,
    }
    if policy is not None:
        options["additional_config"] = kv_policy(**policy)
    with _modules_set_aside():
        llm = LLM(str(model), **{**options, **overrides})
        try:
            yield llm
        finally:
            shut_down(llm)


@contextlib.contextmanager
def _modules_set_aside() -> Iterator[None]:
    """What vLLM's modules hold is not searched for garbage again with every engine.

    Each collects nine times as it starts and ends, in which it also thaws what was
    frozen: nine tenths of a tiny engine's life. Frozen here is what lives on when the
    first has ended, which may be that engine itself, and no other.
    """
    with mock.patch.object(gc, "freeze"), mock.patch.object(gc, "unfreeze"):
        yield
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()
        atexit.register(gc.unfreeze)  # nanobind lists what is never freed


def generate(
    llm: Any, prompts: Sequence[list[int]], tokens: int, budgets: Sequence[Any]
) -> Any:
    """VLLM's outputs of greedy requests, all submitted at once.

    Args:
        llm: The engine.
        prompts: Token ids.
        tokens: Of every answer.
        budgets: ``kv_budget`` of every request, None for none.

    """
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=None if budget is None else {"kv_budget": budget},
        )
        for budget in budgets
    ]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, params, use_tqdm=False)


def greedy(
    llm: Any,
    prompts: Sequence[list[int]],
    tokens: int = 300,
    budgets: Sequence[Any] | None = None,
) -> list[list[int]]:
    """Greedy continuations of token-id prompts, see `generate`."""
    outputs = generate(llm, prompts, tokens, budgets or [None] * len(prompts))
    return [list(output.outputs[0].token_ids) for output in outputs]


def scheduler_of(llm: Any) -> Any:
    """The engine's scheduler."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def runner_of(llm: Any) -> Any:
    """The worker's model runner."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner
