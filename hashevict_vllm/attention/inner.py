"""The stock backends of CUDA that a budget can wrap, and what each needs.

vLLM chooses among its backends as ever (``--attention-backend``, or its own order of
preference for the GPU); what it chose is wrapped, or refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from hashevict_vllm.attention.xformers.support import BACKEND_PATH, CUSTOM, registered
from hashevict_vllm.config import KVPolicyError


@dataclass(frozen=True)
class InnerBackend:
    """What the wrapper must know of a stock backend.

    Attributes:
        plans_on_host: Its metadata are the state of a wrapper object that the next
            ``build`` overwrites, so a step of several attention calls has to build
            before each of them.
        takes_fp8_queries: With an fp8 cache its ``forward`` expects queries that the
            layer has quantised.

    """

    plans_on_host: bool = False
    takes_fp8_queries: bool = False


INNER_BACKENDS = {
    "FLASH_ATTN": InnerBackend(takes_fp8_queries=True),
    "TRITON_ATTN": InnerBackend(takes_fp8_queries=True),
    # Quantises queries itself where its kernel wants that (maybe_quant_query).
    "FLASHINFER": InnerBackend(plans_on_host=True),
    # Ours, on xformers (xformers/backend.py); its metadata are new at every build.
    CUSTOM: InnerBackend(),
}
"""By the name in vLLM's ``AttentionBackendEnum``."""


def refuse_backend(name: str) -> str | None:
    """The sentence for a backend that cannot be wrapped on CUDA; else None.

    Args:
        name: As ``--attention-backend`` takes it. CUSTOM can be wrapped unless another
            plugin has registered its own.

    """
    known = dict(INNER_BACKENDS)
    found = registered() if name == CUSTOM else None
    if found not in (None, BACKEND_PATH):
        del known[CUSTOM]
        name = f"{CUSTOM} ({found})"
    if name in known:
        return None
    return (
        f"--attention-backend: {name} is not one that a KV policy knows how to wrap; "
        f"use one of {', '.join(sorted(known))}."
    )


def inner_backend(name: str) -> InnerBackend:
    """What the wrapper must know of the backend that vLLM chose.

    Raises:
        KVPolicyError: For any other than `INNER_BACKENDS`.

    """
    sentence = refuse_backend(name)
    if sentence is not None:
        raise KVPolicyError(sentence)
    return INNER_BACKENDS[name]
