"""When a client that is turned away may come back: by how fast requests leave, and how many were turned away before."""

from __future__ import annotations

import math
from collections import deque

MIN_RETRY_S = 1
MAX_RETRY_S = 60
REMEMBERED = 64
"""Departures. Requests that came together leave together: a few of them say nothing of the pace."""
COMEBACKS = 4
"""Clients that are to come back for each place that becomes free: not all do, and no place should stay empty."""
MAX_RETURNING = 10_000


class Departures:
    """Learns the time between two ends of requests. A pause in which nothing ran says nothing."""

    def __init__(self) -> None:
        self._intervals: deque[float] = deque(maxlen=REMEMBERED)
        self._last_at: float | None = None
        self._returning: deque[float] = deque(maxlen=MAX_RETURNING)
        """When those are expected back that were turned away."""

    def arrive(self, now: float) -> None:
        """A request has come."""
        if self._last_at is None:  # the time until it ends is as good as that between two ends
            self._last_at = now

    def note(self, now: float, *, num_left: int) -> None:
        """A request has ended, and ``num_left`` are still inside."""
        if self._last_at is not None:
            self._intervals.append(now - self._last_at)
        self._last_at = now if num_left else None

    def turn_away(self, now: float, num_waiting: int) -> int:
        """Whole seconds after which a client that finds no place is to come back.

        ``num_waiting`` requests are inside and have not begun. Without those who were turned away before it would be
        told to come back together with all of them, for the one place that is free by then.
        """
        while self._returning and self._returning[0] <= now:
            self._returning.popleft()
        num_ahead = max(num_waiting + len(self._returning) / COMEBACKS, 1)
        interval_s = sum(self._intervals) / len(self._intervals) if self._intervals else 0.0
        retry_s = min(max(math.ceil(interval_s * num_ahead), MIN_RETRY_S), MAX_RETRY_S)
        self._returning.append(now + retry_s)
        return retry_s
