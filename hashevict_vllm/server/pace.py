"""How often retention may be read: other requests must not feel it.

A read stops the engine between two steps, and then keeps the process busy that streams
all answers. So a read that took t seconds is followed by t / `SHARE` seconds without
one: whatever the model's size and however many look on, reading takes at most that
share of their time. Whoever comes too early is given a turn and told when it is, so
that many who look on come once each, and not again and again.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SHARE = 0.02
"""Most of the engine's and the server's time that reads may take."""

INTERVAL_S = 0.25
"""Least time between two reads of one request."""

PATIENCE_S = 1.0
"""Longest time that a read is held back; one that would wait longer is refused."""

TURN_S = 10.0
"""How long a turn is kept for somebody who does not come."""

HTTP_S = 0.004
"""What a question costs the server beside the read, about: HTTP, and vLLM's layers of
it."""


class Busy(Exception):
    """A read that came too early.

    Attributes:
        retry_after_s: When it may come again.

    """

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"try again in {retry_after_s:.2f} s")
        self.retry_after_s = retry_after_s


class Pace:
    """Times of the reads of one API server."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._free_at = 0.0
        self._cost = 2 * HTTP_S  # until one was measured
        self._last: dict[str, float] = {}
        self._turns: dict[str, float] = {}

    def admit(self, request_id: str) -> float:
        """Seconds for which a read has to wait, once it is let in.

        Args:
            request_id: Whose retention is asked for.

        Raises:
            Busy: If the same request was read less than `INTERVAL_S` ago, or its turn
                comes in more than `PATIENCE_S`.

        """
        now = self._clock()
        self._forget(now)
        if request_id in self._last:
            raise Busy(self._last[request_id] + INTERVAL_S - now)
        turn = self._turns.get(request_id)
        if turn is None:
            turn = max(self._free_at, now)
            self._free_at = turn + self._cost / SHARE
        wait = max(turn - now, 0.0)
        if wait > PATIENCE_S:
            self._turns[request_id] = turn
            raise Busy(wait)
        self._turns.pop(request_id, None)
        self._last[request_id] = now + wait
        return wait

    def account(self, seconds: float) -> None:
        """Note what a read that was let in has cost.

        Args:
            seconds: For which the engine, and then the server, was busy with it.

        """
        more = seconds + HTTP_S - self._cost
        self._free_at += more / SHARE
        self._cost += more / 4

    def _forget(self, now: float) -> None:
        """Reads that are long past, and turns that nobody took."""
        self._last = {k: at for k, at in self._last.items() if now - at < INTERVAL_S}
        self._turns = {k: at for k, at in self._turns.items() if now - at < TURN_S}
