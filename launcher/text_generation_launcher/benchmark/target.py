"""What is measured: a shard, or a whole server. The loop in `session.py` knows no more of it than this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from text_generation_launcher.benchmark.measurements import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A target in words."""

    kind: str
    """``shard``, or the name of the API."""
    address: str
    model: str
    details: dict[str, str]
    """What else it says of itself: dtype, device, version."""
    notes: tuple[str, ...] = ()
    """What a reader must know before the numbers."""

    @property
    def line(self) -> str:
        return " · ".join([self.kind, *self.details.values()])


@dataclass(slots=True)
class Surprises:
    """What came otherwise than asked, gathered over all runs."""

    num_streams: int = 0
    num_short: int = 0
    """Streams that ended before the asked length."""
    prompt_tokens: set[int] = field(default_factory=set)
    """Lengths of prompts as the server counted them."""


class Target(Protocol):
    @property
    def description(self) -> Description: ...

    @property
    def surprises(self) -> Surprises: ...

    async def run(self, batch_size: int, pause: Callable[[], None]) -> Run:
        """Measure one batch. ``pause`` may be called whenever nothing is being timed.

        Raises: BenchmarkError.
        """
        ...

    async def close(self) -> None:
        """Leave the target as if nobody had been there. Never raises."""
        ...
