"""When a client that is refused may come back: measured by how fast requests leave."""

from __future__ import annotations

import math

_MEMORY = 0.9
MIN_RETRY_S = 1
MAX_RETRY_S = 60


class Departures:
    """Learns the time between two ends of requests. A pause in which nothing ran says nothing."""

    def __init__(self) -> None:
        self._interval_s: float | None = None
        self._last_at: float | None = None

    def note(self, now: float, *, num_left: int) -> None:
        """A request has ended, and ``num_left`` are still inside."""
        if self._last_at is not None:
            interval = now - self._last_at
            known = interval if self._interval_s is None else self._interval_s
            self._interval_s = _MEMORY * known + (1 - _MEMORY) * interval
        self._last_at = now if num_left else None

    def retry_after_s(self, num_ahead: int) -> int:
        """Whole seconds until ``num_ahead`` more requests will have ended."""
        if self._interval_s is None:
            return MIN_RETRY_S
        return min(max(math.ceil(self._interval_s * max(num_ahead, 1)), MIN_RETRY_S), MAX_RETRY_S)
