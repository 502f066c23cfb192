"""How often retention may be read: other requests must not feel it.

A read stops the engine between two steps, and then keeps the process busy that streams
all answers. So a read that took t seconds is followed by t / `SHARE` seconds without
one: whatever the model's size and however many look on, reading takes at most that
share of their time.
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

FIRST_COST_S = 0.005
"""What a read is taken to cost before one was measured."""


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
        self._cost = FIRST_COST_S
        self._last: dict[str, float] = {}

    def admit(self, request_id: str) -> float:
        """Seconds for which a read has to wait, once it is let in.

        Args:
            request_id: Whose retention is asked for.

        Raises:
            Busy: If the same request was read less than `INTERVAL_S` ago, or the queue
                is longer than `PATIENCE_S`.

        """
        now = self._clock()
        self._last = {
            key: at for key, at in self._last.items() if now - at < INTERVAL_S
        }
        if request_id in self._last:
            raise Busy(self._last[request_id] + INTERVAL_S - now)
        wait = max(self._free_at - now, 0.0)
        if wait > PATIENCE_S:
            raise Busy(wait)
        self._free_at = now + wait + self._cost / SHARE
        self._last[request_id] = now + wait
        return wait

    def account(self, seconds: float) -> None:
        """Note what a read that was let in has cost.

        Args:
            seconds: For which the engine, and then the server, was busy with it.

        """
        self._free_at += (seconds - self._cost) / SHARE
        self._cost += (seconds - self._cost) / 4
