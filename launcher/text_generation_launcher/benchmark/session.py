"""One benchmark from its first request to its last: the loop, and how it ends early."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from text_generation_launcher.benchmark.config import BenchmarkConfig, ShardAddress
from text_generation_launcher.benchmark.errors import BenchmarkError
from text_generation_launcher.benchmark.progress import Progress
from text_generation_launcher.benchmark.server_target import ServerTarget
from text_generation_launcher.benchmark.shard_target import ShardTarget
from text_generation_launcher.benchmark.target import Surprises, Target


class View(Protocol):
    """Shows progress. It is drawn between runs and steps, never while something is timed."""

    def draw(self) -> None:
        """Something has changed."""
        ...

    def pause(self) -> None:
        """Nothing has changed, but there is a moment to catch up."""
        ...

    def close(self) -> None: ...


MakeView = Callable[[Progress, Callable[[], object]], View]
"""Of the progress, and of what to call when the user wants to stop."""


class End(enum.Enum):
    COMPLETE = 0
    FAILED = 1
    INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A benchmark that is over."""

    end: End
    progress: Progress | None
    """None when nothing could be begun."""
    surprises: Surprises
    error: str = ""


async def run(config: BenchmarkConfig, make_view: MakeView) -> Session:
    """Measure everything, or as much as can be until an error, Ctrl-C or SIGTERM. Never raises for these."""
    task = asyncio.current_task()
    assert task is not None
    target: Target | None = None
    progress: Progress | None = None
    end, text = End.COMPLETE, ""
    with _stopped_by_signals(task.cancel):
        try:
            target = await open_target(config)
            progress = Progress(config, target.description)
            with contextlib.closing(make_view(progress, task.cancel)) as view:
                await measure(target, progress, view)
        except asyncio.CancelledError:
            task.uncancel()
            end = End.INTERRUPTED
        except BenchmarkError as error:
            end, text = End.FAILED, str(error)
    if target is not None:
        await target.close()
    surprises = Surprises() if target is None else target.surprises
    return Session(end=end, progress=progress, surprises=surprises, error=text)


async def open_target(config: BenchmarkConfig) -> Target:
    """Raises: BenchmarkError."""
    if isinstance(config.target, ShardAddress):
        return await ShardTarget.open(config, config.target)
    return await ServerTarget.open(config, config.target)


async def measure(target: Target, progress: Progress, view: View) -> None:
    """Raises: BenchmarkError."""
    for batch_size in progress.config.batch_sizes:
        progress.begin(batch_size)
        view.draw()
        for _ in range(progress.config.warmups):
            await target.run(batch_size, view.pause)
            progress.warmed_up()
            view.draw()
        for _ in range(progress.config.runs):
            progress.add(await target.run(batch_size, view.pause))
            view.draw()
        progress.finish()
        view.draw()


@contextlib.contextmanager
def _stopped_by_signals(stop: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call ``stop``, once: behind it they mean what they always do."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop_once() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)
        stop()

    for number in numbers:
        loop.add_signal_handler(number, stop_once)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
