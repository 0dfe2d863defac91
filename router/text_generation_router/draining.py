"""The way out: nothing new comes in, what runs may finish."""

from __future__ import annotations

import asyncio


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
