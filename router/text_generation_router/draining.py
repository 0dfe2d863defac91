"""The way out: nothing new comes in, what runs may finish."""

from __future__ import annotations

import asyncio
import signal


class Drain:
    """Counts the responses in progress and says whether new ones are taken."""

    def __init__(self) -> None:
        self.begun = False
        self.num_active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __enter__(self) -> None:
        self.num_active += 1
        self._idle.clear()

    def __exit__(self, *exc: object) -> None:
        self.num_active -= 1
        if self.num_active == 0:
            self._idle.set()

    def begin(self) -> None:
        self.begun = True

    async def idle(self, timeout_s: float) -> bool:
        """Wait until no response is in progress; False when ``timeout_s`` passed before."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True


class Shutdown:
    """SIGTERM and SIGINT: the first asks for a drain, the second ends everything at once."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.forced = asyncio.Event()
        self.signal: int | None = None

    def install(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        if self.requested.is_set():
            self.signal = number
            self.forced.set()
        self.requested.set()
