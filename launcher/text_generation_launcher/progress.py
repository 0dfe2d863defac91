"""How far a download or a load has come: bars on a terminal, lines at sensible steps elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

Span = Mapping[str, Any] | None
"""Log span of the child that reports; tells the ranks apart."""
Clock = Callable[[], float]
Write = Callable[[str], None]
Render = Callable[[str, Span], str]
"""A message and its span as a log line."""

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True, slots=True)
class Progress:
    """A child's progress event."""

    stage: str
    """``load weights``, or ``download model.safetensors``."""
    done: float
    total: float | None
    """None or 0 when unknown."""
    unit: str

    @property
    def finished(self) -> bool:
        return bool(self.total) and self.done >= (self.total or 0)

    @property
    def title(self) -> str:
        return self.stage[:1].upper() + self.stage[1:]

    def __str__(self) -> str:
        total = f" of {amount(self.total, self.unit)} ({self.done / self.total:.0%})" if self.total else ""
        return f"{self.title}: {amount(self.done, self.unit)}{total}"

    def ended(self, seconds: float) -> str:
        """The plain line that remains of a stage."""
        spent = f" in {seconds:.1f} s" if seconds >= 0.05 else ""
        return f"{self.title}: {amount(self.done, self.unit)}{spent}"


def parse_progress(fields: Mapping[str, Any]) -> Progress | None:
    """The progress that an event's fields carry; None when they are malformed."""
    done, total = fields.get("done"), fields.get("total")
    if not isinstance(done, int | float) or not isinstance(total, int | float | None):
        return None
    # Files are downloaded side by side: each has its own bar.
    stage = " ".join(str(fields[name]) for name in ("stage", "file") if fields.get(name))
    return Progress(stage or "progress", done, total, str(fields.get("unit", "")))


def amount(number: float, unit: str) -> str:
    """``1.5 GB``, ``12 layers``."""
    if unit in ("bytes", "B"):
        for size, name in _UNITS:
            if number >= size:
                return f"{number / size:.1f} {name}"
    return f"{number:g} {unit}".rstrip()


class StepLines:
    """Progress as lines: one at the end of a stage, and before it one each ``every_s`` seconds."""

    def __init__(self, write: Write, render: Render, *, every_s: float = 5.0, clock: Clock = time.monotonic) -> None:
        self._write = write
        self._render = render
        self._every_s = every_s
        self._clock = clock
        self._times: dict[tuple[str, str], tuple[float, float]] = {}
        """By stage and span: when it began, and when its last line was due."""

    def line(self, text: str) -> None:
        self._write(text)

    def progress(self, progress: Progress, span: Span) -> None:
        key = (str(span), progress.stage)
        now = self._clock()
        began, last = self._times.setdefault(key, (now, now))
        if progress.finished:
            del self._times[key]
            self._write(self._render(progress.ended(now - began), span))
        elif now - last >= self._every_s:
            self._times[key] = (began, now)
            self._write(self._render(str(progress), span))

    def end_progress(self, span: Span) -> None:
        self._times = {key: times for key, times in self._times.items() if key[0] != str(span)}

    def close(self) -> None:
        pass


class Bars:
    """Progress as bars on a terminal; each ends as a plain line, and none is left behind."""

    def __init__(self, write: Write, render: Render, *, clock: Clock = time.monotonic) -> None:
        self._write = write
        self._render = render
        self._clock = clock
        self._rich: RichProgress | None = None
        self._bars: dict[tuple[str, str], tuple[TaskID, float]] = {}
        """By span and stage: rich's task, and when it began."""

    def line(self, text: str) -> None:
        if self._rich is None:
            self._write(text)
            return
        from rich.text import Text

        self._rich.console.print(Text.from_ansi(text), soft_wrap=True)

    def progress(self, progress: Progress, span: Span) -> None:
        key = (str(span), progress.stage)
        if progress.finished:
            _, began = self._bars.get(key, (None, self._clock()))
            self._remove(key)
            self.line(self._render(progress.ended(self._clock() - began), span))
            return
        rich = self._rich or self._open()
        total = progress.total or None
        if key not in self._bars:
            rank = f" {span['rank']}" if span and "rank" in span else ""
            task = rich.add_task(progress.title + rank, total=total, info="")
            self._bars[key] = (task, self._clock())
        rich.update(self._bars[key][0], completed=progress.done, total=total, info=_info(progress))

    def end_progress(self, span: Span) -> None:
        for key in [key for key in self._bars if key[0] == str(span)]:
            self._remove(key)

    def close(self) -> None:
        self._bars.clear()
        self._stop()

    def _remove(self, key: tuple[str, str]) -> None:
        if key in self._bars and self._rich is not None:
            self._rich.remove_task(self._bars.pop(key)[0])
        if not self._bars:
            self._stop()

    def _stop(self) -> None:
        """Take rich off the terminal: its refreshing thread would run as long as the server."""
        if self._rich is not None:
            self._rich.stop()
            self._rich = None

    def _open(self) -> RichProgress:
        # Imported when the first bar is drawn: --help and --env need none.
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


def _info(progress: Progress) -> str:
    total = f" / {amount(progress.total, progress.unit)}" if progress.total else ""
    return amount(progress.done, progress.unit) + total
