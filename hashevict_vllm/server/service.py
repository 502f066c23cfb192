"""What the routes know: the engine's client, the policy, the pace of reads."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from importlib.metadata import version
from typing import Any

from hashevict_vllm.config import KVPolicyConfig
from hashevict_vllm.server.lookup import internal_id
from hashevict_vllm.server.pace import Pace
from hashevict_vllm.server.retention import Question, answer
from hashevict_vllm.server.schemas import KVPolicy

READ_STATE = "kv_policy_state"
READ_RETENTION = "kv_policy_retention"
"""Methods of ``EngineCore`` that `vllm_patches.endpoint_plugins` adds."""


class UnknownRequest(Exception):
    """No live request has that id, prompt and choice."""


class TooMuch(Exception):
    """More slots than one read may copy; the text says how many."""


class Service:
    """Asks the engine on behalf of the routes.

    Args:
        client: vLLM's ``AsyncLLM``.
        config: The policy, enabled.

    """

    def __init__(self, client: Any, config: KVPolicyConfig) -> None:
        self._client = client
        self._config = config
        self._pace = Pace()
        self._state: dict[str, Any] | None = None

    async def policy(self) -> KVPolicy:
        """What is served; the engine is asked once."""
        import vllm

        if self._state is None:
            self._state = (await self._ask(READ_STATE))[0]
        state, model = self._state, self._client.vllm_config.model_config
        return KVPolicy(
            version=version("hashevict-vllm"),
            vllm_version=vllm.__version__,
            policy=dataclasses.asdict(self._config),
            effective=state["policy"],
            max_model_len=model.max_model_len,
            inspect=self._config.inspect,
            **{k: state[k] for k in ("block_size", "num_blocks", "layers", "capacity")},
        )

    async def retention(
        self,
        request_id: str,
        prompt: int,
        choice: int,
        layers: list[int] | None,
        asked: Question,
    ) -> str:
        """What a request holds now, `Retention` as JSON.

        Args:
            request_id: As the client knows it.
            prompt: Index of the prompt of a completion.
            choice: Index of the answer.
            layers: Indices; None for all, or as many as one read may copy.
            asked: What to show of them.

        Raises:
            UnknownRequest: If it is not, or no longer, live.
            Busy: If it comes too early.
            TooMuch: If the layers hold too many slots for one read.
            TooLarge: If the answer would be beyond a bound.

        """
        self._internal_id(request_id, prompt, choice)
        await asyncio.sleep(self._pace.admit(f"{request_id} {prompt} {choice}"))
        # It may have ended meanwhile.
        internal = self._internal_id(request_id, prompt, choice)
        answers = await self._ask(READ_RETENTION, internal, layers, asked.slots)
        found = next((found for found in answers if found is not None), None)
        if found is None:
            raise UnknownRequest(request_id)
        if "refused" in found:
            raise TooMuch(
                f"layers: they hold {found['refused']} slots, more than one read may "
                "copy; name fewer."
            )
        # Not in the event loop: other answers stream meanwhile.
        text, seconds = await asyncio.to_thread(_as_json, request_id, found, asked)
        self._pace.account(found["seconds"] + seconds)
        return text

    def _internal_id(self, request_id: str, prompt: int, choice: int) -> str:
        processor = self._client.output_processor
        internal = internal_id(processor, request_id, prompt, choice)
        if internal is None:
            raise UnknownRequest(request_id)
        return internal

    async def _ask(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every engine (data parallel); only one has the request."""
        core = self._client.engine_core
        answers: list[Any] = await core.call_utility_all_async(method, *args)
        return answers


def _as_json(request_id: str, found: dict[str, Any], asked: Question) -> Any:
    """The answer, and the seconds of a processor that it took."""
    started = time.thread_time()
    text = answer(request_id, found, asked).model_dump_json()
    return text, time.thread_time() - started
