"""Patches the HTTP server: our routes are there where ``--kv-policy`` asks for them.

Where: ``load_endpoint_plugins`` in ``vllm/plugins/__init__.py``, which the server calls
when it builds its app. Why there: vLLM loads endpoint plugins that ``VLLM_PLUGINS``
names, and no others, as an installed package must not open routes by itself; an entry
point that is not named costs a warning at every start. A policy is asked for by flags,
and so are its routes: with the policy off the plugin adds none. Naming it in
``VLLM_PLUGINS`` would, besides, shut out every plugin that is not named.

``EngineCore`` gains two methods that the routes call; it runs any method that a client
names (``_handle_client_request`` in vllm/v1/engine/core.py), and nothing of vLLM's own
is replaced, so they are set in patched vLLM too.

Upstream fix: patches/*/endpoint_plugins.patch, ``vllm.plugins.more_endpoint_plugins``.
"""

from __future__ import annotations

import functools
from typing import Any

TASK = "generate"


def in_vllm() -> bool:
    """Whether general plugins may bring endpoint plugins along."""
    import vllm.plugins

    return hasattr(vllm.plugins, "more_endpoint_plugins")


def apply() -> None:
    """Patch once per process."""
    import vllm.plugins
    from vllm.v1.engine.core import EngineCore

    EngineCore.kv_policy_retention = _read_retention
    EngineCore.kv_policy_state = _read_state
    stock = vllm.plugins.load_endpoint_plugins
    if in_vllm():
        if make_plugin not in vllm.plugins.more_endpoint_plugins:
            vllm.plugins.more_endpoint_plugins.append(make_plugin)
    elif not hasattr(stock, "hashevict_stock"):
        vllm.plugins.load_endpoint_plugins = _with_ours(stock)


def make_plugin() -> Any:
    """Our endpoint plugin; imported here, as only a server has use for FastAPI."""
    from hashevict_vllm.server.plugin import KVPolicyEndpoints

    return KVPolicyEndpoints()


def _with_ours(stock: Any) -> Any:
    @functools.wraps(stock)
    def load_endpoint_plugins(supported_tasks: Any = None) -> list[Any]:
        plugins = stock(supported_tasks)
        if TASK in (supported_tasks or ()):
            plugins.append(make_plugin())
        return plugins

    load_endpoint_plugins.hashevict_stock = stock  # type: ignore[attr-defined]
    return load_endpoint_plugins


def _read_retention(self: Any, request_id: Any, layers: Any, votes: Any) -> Any:
    from hashevict_vllm.cache.retention import read_retention

    return read_retention(self, request_id, layers, votes)


def _read_state(self: Any) -> Any:
    from hashevict_vllm.cache.retention import read_state

    return read_state(self)
