"""What is inside and has not begun: whether more may wait, and when a client that may not is to come back."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

MIN_RETRY_S = 1
MAX_RETRY_S = 60
REMEMBERED = 64
"""Departures. Requests that came together leave together: a few of them say nothing of the pace."""
COMEBACKS = 2
"""Clients that are to come back for each place that becomes free: not all do, and no place should stay empty."""
MAX_RETURNING = 10_000

T = TypeVar("T")


class Backlog:
    """Of one batcher."""

    def __init__(self, num_waiting: Callable[[], int], max_queue_size: int | None) -> None:
        """``num_waiting``: requests that have not begun. ``max_queue_size``: of them at most; None: as many as are let
        in."""
        self._num_waiting = num_waiting
        self._max_queue_size = max_queue_size
        self._departures = Departures()

    @property
    def is_full(self) -> bool:
        """Whether as many wait as may."""
        return self._max_queue_size is not None and self._num_waiting() >= self._max_queue_size

    def turn_away(self) -> int:
        """Seconds after which it is worth for a client to come back that finds no place now."""
        return self._departures.turn_away(time.perf_counter(), self._num_waiting())

    def surplus(self, not_begun: Callable[[], Sequence[T]]) -> Sequence[T]:
        """Those that may not wait any longer. ``not_begun``: gathers them, in the order in which they came.

        Who comes at once is let in at once, since some may begin at once; asked when a step was planned, it tells whom
        that left behind.
        """
        return not_begun()[self._max_queue_size :] if self.is_full else ()

    def arrive(self) -> None:
        """A request has come."""
        self._departures.arrive(time.perf_counter())

    def leave(self, *, num_left: int) -> None:
        """A request has ended, and ``num_left`` are still inside. Of one that was turned away nothing is to be told:
        it says nothing of the pace."""
        self._departures.note(time.perf_counter(), num_left=num_left)


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
