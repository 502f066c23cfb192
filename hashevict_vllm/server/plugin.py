"""The endpoint plugin: hangs the routes into vLLM's server where a policy is on.

vLLM's contract: ``vllm/plugins/endpoint_plugins/interface.py``.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from vllm.logger import init_logger

from hashevict_vllm.config import policy_of
from hashevict_vllm.metrics.usage import CountedCalls
from hashevict_vllm.server import pages
from hashevict_vllm.server.routes import PREFIX, inspection, routes
from hashevict_vllm.server.service import Service

logger = init_logger("vllm.hashevict_vllm.server")


class KVPolicyEndpoints:
    """vLLM's ``EndpointPlugin``; does nothing with the policy off."""

    name = "hashevict"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and to each call a tally of what it evicts.

        Args:
            app: Its ``state.args`` hold the policy: ``EngineArgs.from_cli_args`` has
                put it there (`vllm_patches.engine_args`).

        """
        config = policy_of(app.state.args.additional_config)
        if not config.enabled:
            return
        app.add_middleware(CountedCalls)
        app.include_router(routes)
        if config.inspect:
            app.include_router(inspection)
            app.add_api_route(f"{PREFIX}/ui", pages.to_page, include_in_schema=False)
            app.mount(pages.ADDRESS, pages.PageFiles())

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Give the routes the engine's client.

        Args:
            engine_client: ``AsyncLLM``.
            state: Of the app.
            args: Of the server.

        """
        config = policy_of(args.additional_config)
        if not config.enabled:
            return
        state.kv_policy = Service(engine_client, config)
        if config.inspect:
            logger.info(
                "Inspection is on: whoever may send requests can read which tokens a "
                "live request keeps, by its id. The page is at %s%s/",
                args.root_path or "",
                pages.ADDRESS,
            )
