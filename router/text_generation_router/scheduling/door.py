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

PATIENCE_S = 0.02
"""From when a request waits for shards that have nothing to do, and from when the last one came: a long text takes
seconds."""
LEAD_S = 0.003
"""By which the next step is sent before the one that runs is expected to end."""


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

    def wait_while_idle(self, since: float) -> float:
        """The time up to which a first step may wait for those at the door. ``since``: when a request began to wait."""
        if not self._since:
            return 0.0
        last_came = next(reversed(self._since.values()))
        return min(last_came, since) + PATIENCE_S

    def wait_while_busy(self, step_ends_at: float) -> float:
        """The same of a step behind one that runs anyway."""
        return step_ends_at - LEAD_S if self._since else 0.0
