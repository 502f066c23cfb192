"""Whether the server of this machine answers: the health check of the images.

Command line: ``python3 -m hashevict_vllm.health`` asks ``/health`` over plain HTTP, on
the port that ``HASHEVICT_PORT`` names (8000), and exits with 0 if all is well. Standard
library only, and quick to import: it runs every few seconds.
"""

from __future__ import annotations

import http.client
import os
import sys

DEFAULT_PORT = 8000
TIMEOUT_S = 5.0


def why_unhealthy(port: int) -> str | None:
    """Ask a server of this machine.

    Args:
        port: Where it should listen.

    Returns:
        What is wrong in one sentence; None if nothing is.

    """
    # http.client, as urllib would ask a proxy that the environment names.
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"no answer on port {port}: {error or type(error).__name__}."
    finally:
        connection.close()
    return None if status == http.HTTPStatus.OK else f"/health answered {status}."


def main() -> None:
    """Command line: exit status 0 for a healthy server, else 1 and a sentence."""
    reason = why_unhealthy(int(os.environ.get("HASHEVICT_PORT") or DEFAULT_PORT))
    if reason:
        sys.exit(f"hashevict-vllm: {reason}")


if __name__ == "__main__":
    main()
