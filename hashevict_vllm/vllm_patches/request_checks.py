"""Patches the doors of an engine: budgets that cannot be served are refused.

Where: ``InputProcessor.process_inputs``, in the process of the API server, when the
length of the prompt and ``max_tokens`` are known and nothing has been stored: vLLM
answers with a 400, and ``LLM.generate`` raises its ``VLLMValidationError``. And
``EngineCore.preprocess_add_request``, for front ends that are not Python's: there vLLM
fails the one request and goes on.

Upstream fix: patches/*/request_checks.patch, ``request_checks``.
"""

from __future__ import annotations

import functools
from typing import Any


def check_request(vllm_config: Any, request: Any, num_engines: int) -> None:
    """Refuse a request whose ``kv_budget`` the policy cannot serve, if one is on.

    Args:
        vllm_config: As the process knows it, once the pool has its size.
        request: ``EngineCoreRequest``.
        num_engines: Those whose blocks ``cache_config.num_gpu_blocks`` adds up.

    Raises:
        VLLMValidationError: vLLM's own for requests that it cannot serve.

    """
    from hashevict_vllm.request_budget import KEY

    params = request.sampling_params
    value = (params.extra_args or {}).get(KEY) if params else None
    if value is None:
        return
    from vllm.exceptions import VLLMValidationError

    from hashevict_vllm.config import KVPolicyError, policy_of
    from hashevict_vllm.host import block_size_of, resolve
    from hashevict_vllm.request_budget import check_budget

    config = policy_of(vllm_config.additional_config)
    if not config.enabled:
        return
    longest = vllm_config.model_config.max_model_len
    block_size, policy = block_size_of(vllm_config), resolve(config, vllm_config)
    prompt = request.prompt_token_ids
    tokens = len(request.prompt_embeds if prompt is None else prompt)
    tokens = min(tokens + (params.max_tokens or longest), longest)
    # Each engine keeps one block for itself. A pool that groups of layers share has
    # room for the longest request, or has refused to start (`cache.capacity`).
    blocks = vllm_config.cache_config.num_gpu_blocks // num_engines - 1
    room = blocks * block_size
    try:
        check_budget(policy, block_size, value, tokens, room)
    except KVPolicyError as error:
        raise VLLMValidationError(str(error)) from None


def in_vllm() -> bool:
    """Whether vLLM lets plugins refuse requests."""
    from vllm.v1 import engine

    return hasattr(engine, "request_checks")


def apply() -> None:
    """Patch once per process."""
    from vllm.v1 import engine
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor

    if in_vllm():
        if check_request not in engine.request_checks:
            engine.request_checks.append(check_request)
    elif not hasattr(InputProcessor.process_inputs, "hashevict_stock"):
        InputProcessor.process_inputs = _checked(InputProcessor.process_inputs)
        EngineCore.preprocess_add_request = _checked_core(
            EngineCore.preprocess_add_request
        )


def _checked(stock: Any) -> Any:
    @functools.wraps(stock)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = stock(self, *args, **kwargs)
        # As many as ``process_inputs`` counts for ``data_parallel_rank``.
        parallel = self.vllm_config.parallel_config
        num_engines = parallel.data_parallel_size
        if parallel.local_engines_only:
            num_engines = parallel.data_parallel_size_local
        check_request(self.vllm_config, request, num_engines)
        return request

    process_inputs.hashevict_stock = stock  # type: ignore[attr-defined]
    return process_inputs


def _checked_core(stock: Any) -> Any:
    @functools.wraps(stock)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        check_request(self.vllm_config, request, 1)
        return stock(self, request)

    return preprocess_add_request
