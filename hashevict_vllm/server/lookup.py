"""From the id that a client sees to the engine's own.

A client sees ``chatcmpl-X``; the engine calls the request ``chatcmpl-X-1a2b3c4d``, the
prompts of ``cmpl-X`` are ``cmpl-X-0-…``, ``cmpl-X-1-…``, and with ``n`` answers each
has an id besides. Only the API server knows which belongs to which
(``OutputProcessor.external_req_ids``): ids are looked up, never guessed from their
beginnings, so that nobody is shown another's request.
"""

from __future__ import annotations

from typing import Any

COMPLETION = "cmpl-"


def internal_id(
    output_processor: Any, request_id: str, prompt: int, choice: int
) -> str | None:
    """The engine's id of a live request; None if there is none.

    Args:
        output_processor: Of the API server's ``AsyncLLM``.
        request_id: As in the ``id`` of an answer.
        prompt: Index of the prompt, where a completion has several.
        choice: Index of the answer, where ``n`` asks for several.

    """
    if request_id.startswith(COMPLETION):
        # vllm/entrypoints/openai/completion/serving.py: f"{request_id}-{i}"
        external = f"{request_id}-{prompt}"
    elif prompt == 0:
        external = request_id
    else:
        return None
    states = output_processor.request_states
    # A defaultdict: asking with [] would add the id.
    for internal in output_processor.external_req_ids.get(external, ()):
        state = states.get(internal)
        if state is not None and state.request_index == choice:
            return str(internal)
    return None
