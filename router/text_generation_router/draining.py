"""The way out: nothing new comes in, what runs may finish."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from text_generation_router.errors import ShuttingDown

Result = TypeVar("Result")


class Drain:
    """Counts the responses in progress and says whether new ones are taken."""

    def __init__(self) -> None:
        self.num_active = 0
        self._begun_at = 0.0
        self._begun = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def __enter__(self) -> None:
        self.num_active += 1
        self._idle.clear()

    def __exit__(self, *exc: object) -> None:
        self.num_active -= 1
        if self.num_active == 0:
            self._idle.set()

    @property
    def begun(self) -> bool:
        return self._begun.is_set()

    def begin(self) -> None:
        self._begun_at = time.monotonic()
        self._begun.set()

    @property
    def age_s(self) -> float:
        """Since it has begun."""
        return time.monotonic() - self._begun_at

    async def unless_begun(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of ``work``, which is cancelled when the drain begins before it is there. Raises: ShuttingDown."""
        working = asyncio.create_task(work)
        begun = asyncio.create_task(self._begun.wait())
        try:
            await asyncio.wait((working, begun), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ShuttingDown
            return working.result()
        finally:
            begun.cancel()
            working.cancel()

    async def idle(self, timeout_s: float) -> bool:
        """Wait until no response is in progress; False when ``timeout_s`` passed before."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


class Shutdown:
    """SIGTERM and SIGINT: the first asks for a drain, the second ends everything at once. SIGUSR1, from the launcher:
    it will start no shard again."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.forced = asyncio.Event()
        self.signal: int | None = None
        self.on_shards_gone: Callable[[], None] = lambda: None
        """Called on SIGUSR1."""

    def install(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGUSR1, lambda: self.on_shards_gone())

    def _on_signal(self, number: int) -> None:
        if self.requested.is_set():
            self.signal = number
            self.forced.set()
        self.requested.set()
