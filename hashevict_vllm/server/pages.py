"""The page's files, with headers that keep it to itself.

They hold no data and no key, and so lie outside ``/v1``: a browser cannot send an API
key when it opens an address. The page asks for the key and sends it with each of its
own requests. `/v1/kv_policy/ui` leads there, for whoever may read it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles

ADDRESS = "/kv_policy/ui"
"""Where the files are mounted."""

DIRECTORY = Path(__file__).with_name("ui")

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class PageFiles(StaticFiles):
    """Static files with `HEADERS`."""

    def __init__(self) -> None:
        super().__init__(directory=DIRECTORY, html=True)

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """As the base class."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def to_page() -> RedirectResponse:
    """From ``/v1/kv_policy/ui``; relative, as a proxy may serve us below a path."""
    return RedirectResponse(f"../..{ADDRESS}/")
