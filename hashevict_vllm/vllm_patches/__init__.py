"""Run-time patches of vLLM, one file per patched class: this is their index.

``engine_args.py`` — ``vllm.engine.arg_utils.EngineArgs``
    ``add_cli_args`` gains the ``--kv-policy`` options, ``from_cli_args`` turns them
    into ``additional_config["kv_policy"]`` and ``create_engine_config`` refuses what a
    policy cannot serve. vLLM lets a plugin add choices to options, but not options.
``attention_layer.py`` — the backend chosen for a full-attention layer
    is wrapped when a policy is on. vLLM caches its choice of backend per process and
    selector config, so a registered override would capture every model.
``model_runner.py`` — model runner V1
    hands prompt lengths to the metadata builder.
``model_runner_v2.py`` — model runner V2
    does so too, without a copy to or from the device.
``request_args.py`` — both model runners
    hand the ``extra_args`` of requests to the metadata builder.
``request_checks.py`` — the engine's input processor and core
    refuse requests whose ``kv_budget`` cannot be served.
``decode_graphs.py`` — both model runners
    keep chunks of one prompt token out of full decode graphs, if a builder says so.
``engine_core.py`` — the engine core
    and workers refuse a model that the policy did not reach; the capacity is logged.
``request_stats.py`` — the engine's client
    counts tokens per request for a policy's metrics, and has a logger that shows them.
``usage.py`` — ``AsyncLLM.generate`` and ``UsageInfo``
    say in a response's ``usage`` how many tokens were evicted.
``block_zeroing.py`` — the KV cache's configuration and the CPU's model runner
    zero new blocks that budgeted layers share with others, as their metadata may lie
    where those keep K and V.
``streaming_input.py`` — ``AsyncLLM``, ``LLMEngine`` and the engine core
    refuse sessions that lengthen the prompt of a live request.
``cpu_generators.py`` — the CPU's model runner
    survives a request with ``seed`` whose prompt takes several steps.
``kv_cache_manager.py`` — ``KVCacheManager``
    introduces requests to its managers, which describe their block copies.
``scheduler.py`` — ``Scheduler``
    lets managers shorten a chunk, so that what it fills can be cached.
``block_copies.py`` — both model runners
    copy blocks with their tails.
``endpoint_plugins.py`` — ``vllm.plugins``
    loads the policy's routes into a server; the engine core reads pages for them.
``kernel_dispatcher.py`` — ``vllm.triton_utils.dispatcher``
    survives numba being imported before a worker starts (llvmlite's ``ffi.lib``).

Every module has an idempotent ``apply()``; with the policy off, a patched function
does what the original does. ``in_vllm()`` says whether this vLLM was built with the
upstream counterpart in ``patches/``: then ``apply()`` uses that extension point, and
patches nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

PATCHES = (
    "engine_args",
    "attention_layer",
    "model_runner",
    "model_runner_v2",
    "request_args",
    "request_checks",
    "decode_graphs",
    "scheduler",
    "engine_core",
    "request_stats",
    "usage",
    "block_zeroing",
    "streaming_input",
    "cpu_generators",
    "kv_cache_manager",
    "block_copies",
    "endpoint_plugins",
    "kernel_dispatcher",
)
"""Modules of this package, in the order in which they are applied."""


def apply_all() -> None:
    """Apply every patch of `PATCHES`; calling it again changes nothing."""
    for name in PATCHES:
        _module(name).apply()


def in_vllm() -> dict[str, bool]:
    """For each of `PATCHES`, whether this vLLM has the upstream counterpart."""
    return {name: _module(name).in_vllm() for name in PATCHES}


def _module(name: str) -> Any:
    # Imported here: each of them imports the vLLM module that it patches.
    return importlib.import_module(f"{__name__}.{name}")
