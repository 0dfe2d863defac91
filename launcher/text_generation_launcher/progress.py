"""How far a download or a load has come: bars on a terminal, lines at sensible steps elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True, slots=True)
class Progress:
    """A child's progress event."""

    stage: str
    done: float
    total: float | None
    """None or 0 when unknown."""
    unit: str

    @property
    def finished(self) -> bool:
        return bool(self.total) and self.done >= (self.total or 0)

    def __str__(self) -> str:
        total = f" of {amount(self.total, self.unit)} ({self.done / self.total:.0%})" if self.total else ""
        return f"{self.stage.capitalize()}: {amount(self.done, self.unit)}{total}"


def parse_progress(fields: Mapping[str, Any]) -> Progress | None:
    """The progress that an event's fields carry; None when they are malformed."""
    done, total = fields.get("done"), fields.get("total")
    if not isinstance(done, int | float) or not isinstance(total, int | float | None):
        return None
    return Progress(str(fields.get("stage", "progress")), done, total, str(fields.get("unit", "")))


def amount(number: float, unit: str) -> str:
    """``1.5 GB``, ``12 layers``."""
    if unit in ("bytes", "B"):
        for size, name in _UNITS:
            if number >= size:
                return f"{number / size:.1f} {name}"
    return f"{number:g} {unit}".rstrip()


class StepLines:
    """Progress as lines: one at the end of a stage, and before it one each ``every_s`` seconds."""

    def __init__(
        self,
        write: Callable[[str], None],
        render: Callable[[str, Mapping[str, Any] | None], str],
        *,
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._render = render
        self._every_s = every_s
        self._clock = clock
        self._last: dict[tuple[str, str], float] = {}

    def line(self, text: str) -> None:
        self._write(text)

    def progress(self, progress: Progress, span: Mapping[str, Any] | None) -> None:
        key = (progress.stage, str(span))
        now = self._clock()
        last = self._last.setdefault(key, now)
        if progress.finished:
            del self._last[key]
        elif now - last < self._every_s:
            return
        else:
            self._last[key] = now
        self._write(self._render(str(progress), span))

    def close(self) -> None:
        pass


class Bars:
    """Progress as bars on a terminal; each ends as a plain line, and none is left behind."""

    def __init__(self, write: Callable[[str], None], render: Callable[[str, Mapping[str, Any] | None], str]) -> None:
        self._write = write
        self._render = render
        self._rich: RichProgress | None = None
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def line(self, text: str) -> None:
        if self._rich is None:
            self._write(text)
            return
        from rich.text import Text

        self._rich.console.print(Text.from_ansi(text), soft_wrap=True)

    def progress(self, progress: Progress, span: Mapping[str, Any] | None) -> None:
        key = (progress.stage, str(span))
        if progress.finished:
            self._finish(key)
            self._write(self._render(str(progress), span)) if self._rich is None else self.line(
                self._render(str(progress), span)
            )
            return
        rich = self._rich or self._open()
        if key not in self._tasks:
            rank = "" if not span or "rank" not in span else f" {span['rank']}"
            self._tasks[key] = rich.add_task(progress.stage.capitalize() + rank, total=progress.total or None)
        rich.update(self._tasks[key], completed=progress.done, total=progress.total or None, info=_info(progress))

    def close(self) -> None:
        if self._rich is not None:
            self._rich.stop()
            self._rich = None
            self._tasks.clear()

    def _open(self) -> RichProgress:
        # Imported when the first bar is drawn: --help and --env need no bars.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._rich = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[info]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(highlight=False),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._rich.start()
        return self._rich

    def _finish(self, key: tuple[str, str]) -> None:
        task = self._tasks.pop(key, None)
        if task is not None and self._rich is not None:
            self._rich.remove_task(task)
        if not self._tasks:
            self.close()


def _info(progress: Progress) -> str:
    total = f" / {amount(progress.total, progress.unit)}" if progress.total else ""
    return amount(progress.done, progress.unit) + total
