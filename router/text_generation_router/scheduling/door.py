"""Requests about to join the queue, and how long a step that could begin without them waits for them.

Requests that come at once become ready one after another, as their texts are tokenised. Without waiting, the first
computes alone and a second step is sent behind it with whoever is ready by then: all others see their first token after
these two. Measured on two cores, 16 requests of 32 tokens behind 2,048 cached ones: the last 14 were computed from
175 ms on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

PATIENCE_IDLE_S = 0.02
"""For others, from when the first request waits, while the shards have nothing to do."""
PATIENCE_BUSY_S = 0.1
"""For a request, from when it has come, while a step runs anyway. A long text takes seconds."""


class Door:
    def __init__(self, on_leave: Callable[[], None]) -> None:
        """``on_leave`` is called whenever one has gone, into the queue or away."""
        self._on_leave = on_leave
        self._since: dict[object, float] = {}
        """When each came, the last one last."""

    @contextlib.contextmanager
    def entering(self) -> Iterator[None]:
        ticket = object()
        self._since[ticket] = time.perf_counter()
        try:
            yield
        finally:
            del self._since[ticket]
            self._on_leave()

    def wait_s(self, now: float, *, idle_since: float | None) -> float:
        """How long the next step may wait for those at the door; not more than 0: it does not.

        ``idle_since``: when the first request began to wait for shards that have nothing to do; None if they have.
        """
        if not self._since:
            return 0.0
        last_came = next(reversed(self._since.values()))
        if idle_since is None:
            return last_came + PATIENCE_BUSY_S - now
        return min(last_came, idle_since) + PATIENCE_IDLE_S - now
