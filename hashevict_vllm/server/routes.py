"""The routes. vLLM's ``--api-key`` guards them, as it does all paths under ``/v1``."""

from __future__ import annotations

import math
import re
from http import HTTPStatus
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Path, Query, Request
from fastapi.responses import JSONResponse, Response

from hashevict_vllm.server.pace import Busy
from hashevict_vllm.server.retention import MAX_CELLS, Question, TooLarge
from hashevict_vllm.server.schemas import Error, ErrorInfo, KVPolicy, Retention, Stats
from hashevict_vllm.server.service import Service, TooMuch, UnknownRequest
from hashevict_vllm.server.stats import current_stats

PREFIX = "/v1/kv_policy"
MAX_LAYERS_NAMED = 1024
MAX_POSITION = 2**31 - 1

_LAYERS = re.compile(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*")

routes = APIRouter(prefix=PREFIX, tags=["KV policy"])
"""Those that every server with a policy has."""

inspection = APIRouter(prefix=PREFIX, tags=["KV policy"])
"""Those that show what a request's cache holds, with ``inspect`` only."""


def _service(request: Request) -> Service:
    service: Service = request.app.state.kv_policy
    return service


@routes.get("", summary="The KV policy that is served, and what it buys")
async def get_policy(request: Request) -> KVPolicy:
    """Configuration, effective numbers, capacity and versions."""
    return await _service(request).policy()


@routes.get("/stats", summary="What the budget has done so far")
def get_stats() -> Stats:
    """The counters and gauges of `/metrics` that begin with `hashevict:`.

    Empty with `--disable-log-stats`.
    """
    return current_stats()


@inspection.get(
    "/requests/{request_id}/retention",
    summary="Which positions a live request still holds",
    response_model=Retention,
    responses={
        HTTPStatus.BAD_REQUEST.value: {"model": Error},
        HTTPStatus.NOT_FOUND.value: {"model": Error},
        HTTPStatus.TOO_MANY_REQUESTS.value: {
            "model": Error,
            "description": "Too early: `Retry-After` says when.",
        },
    },
)
async def get_retention(
    request: Request,
    request_id: Annotated[
        str, Path(max_length=256, description="The `id` of the answer.")
    ],
    prompt: Annotated[
        int, Query(ge=0, description="Which prompt of a completion that has several.")
    ] = 0,
    choice: Annotated[
        int, Query(ge=0, description="Which answer, where `n` asked for several.")
    ] = 0,
    layers: Annotated[
        str | None,
        Query(
            max_length=4096,
            description="Such as `0,8-11`; all if not given, or as many, evenly "
            "spaced, as one read may copy.",
        ),
    ] = None,
    start: Annotated[int, Query(ge=0, le=MAX_POSITION)] = 0,
    stop: Annotated[int | None, Query(ge=0, le=MAX_POSITION)] = None,
    columns: Annotated[
        int,
        Query(
            ge=1,
            le=MAX_CELLS,
            description="Most columns of `held`; each adds up `width` positions.",
        ),
    ] = 256,
    include: Annotated[
        list[Literal["bitmap", "slots"]],
        Query(description="Bits by head; positions and votes by head."),
    ] = [],  # noqa: B006 -- FastAPI copies it
) -> Any:
    """Read between two steps of the engine; other requests wait for less than one.

    A request is known from its first token to its last, by the API server that it was
    sent to.
    """
    asked = Question(start, stop, columns, "bitmap" in include, "slots" in include)
    named = None if layers is None else parse_layers(layers)
    try:
        found = await _service(request).retention(
            request_id, prompt, choice, named, asked
        )
    except UnknownRequest:
        raise HTTPException(
            HTTPStatus.NOT_FOUND,
            "No request with this id is running here: it has finished, or has none of "
            "this prompt and choice, or never was.",
        ) from None
    except (TooLarge, TooMuch) as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from None
    except Busy as busy:
        return _too_early(busy)
    return Response(found, media_type="application/json")


def parse_layers(text: str) -> list[int]:
    """``0,8-11`` as indices, ascending.

    Raises:
        HTTPException: 400 for anything else.

    """
    if not _LAYERS.fullmatch(text):
        raise HTTPException(
            HTTPStatus.BAD_REQUEST,
            f"layers: expected indices and ranges such as 0,8-11, got {text!r}.",
        )
    named: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        named.update(range(int(first), int(last or first) + 1))
    if len(named) > MAX_LAYERS_NAMED:
        raise HTTPException(
            HTTPStatus.BAD_REQUEST,
            f"layers: {len(named)} are more than {MAX_LAYERS_NAMED}; name fewer.",
        )
    return sorted(named)


def _too_early(busy: Busy) -> JSONResponse:
    """429; not raised, as vLLM's handler of exceptions drops headers."""
    code = HTTPStatus.TOO_MANY_REQUESTS
    message = f"Retention is read elsewhere, or was just now: {busy}."
    error = Error(error=ErrorInfo(message=message, type=code.phrase, code=code.value))
    after = str(math.ceil(busy.retry_after_s))
    return JSONResponse(error.model_dump(), code.value, headers={"Retry-After": after})
