"""The two ways of showing progress: a full screen on a terminal, lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live

from text_generation_launcher.benchmark.keyboard import Key, Keyboard
from text_generation_launcher.benchmark.measurements import Summary, summarise
from text_generation_launcher.benchmark.progress import Progress
from text_generation_launcher.benchmark.screen import Screen
from text_generation_launcher.benchmark.text import NOTHING, clock, short

DRAW_EVERY_S = 0.2
LINE_EVERY_S = 5.0


def make_view(progress: Progress, stop: Callable[[], object]) -> FullScreen | Lines:
    """Standard error is where progress goes: tables and JSON have standard output for themselves."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        return FullScreen(progress, stop, console)
    return Lines(progress)


class FullScreen:
    """Drawn on the alternate screen, so that nothing of it is left behind."""

    def __init__(self, progress: Progress, stop: Callable[[], object], console: Console) -> None:
        self._screen = Screen(progress)
        self._stop = stop
        # Without a thread of its own: it would draw while something is timed.
        self._live = Live(self._screen, console=console, screen=True, auto_refresh=False, redirect_stdout=False)
        self._drawn_at = 0.0
        self._live.start()
        self._keyboard = Keyboard(self._press)

    def draw(self) -> None:
        self.pause()

    def pause(self) -> None:
        now = time.monotonic()
        if now - self._drawn_at >= DRAW_EVERY_S:
            self._drawn_at = now
            self._live.refresh()

    def close(self) -> None:
        self._keyboard.close()
        self._live.stop()

    def _press(self, key: Key) -> None:
        match key:
            case Key.LEFT:
                self._screen.move(-1)
            case Key.RIGHT:
                self._screen.move(1)
            case Key.QUIT:
                self._stop()
                return
        self._drawn_at = 0.0  # at the next moment in which nothing is timed


class Lines:
    """One line at the beginning and the end of a batch size, and one every few seconds between."""

    def __init__(self, progress: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress = progress
        self._clock = clock
        self._said_at = clock()
        self._num_finished = 0
        description = progress.description
        self._say(f"{description.model}: {description.line} at {description.address}")
        for note in description.notes:
            self._say(f"Note: {note}")

    def draw(self) -> None:
        progress = self._progress
        if len(progress.finished) > self._num_finished:
            self._num_finished = len(progress.finished)
            self._say(summary_line(progress, progress.finished[-1]))
        elif self._clock() - self._said_at >= LINE_EVERY_S:
            self._say(f"batch size {progress.batch_size}: {progress.doing()}, {clock(progress.elapsed_s)}")

    def pause(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _say(self, text: str) -> None:
        self._said_at = self._clock()
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def summary_line(progress: Progress, batch_size: int) -> str:
    """What a batch size has come to."""
    result = progress.result(batch_size)
    prefill, token, rate = map(summarise, (result.prefill_s, result.token_s, result.decode_rates))
    text = f"batch size {batch_size}: prefill {_p50(prefill)}"
    if token is not None:
        text += f", decode {_p50(token)} a token, {short(rate.average) if rate else NOTHING} tokens/s"
    return text + " (p50, average rate)"


def _p50(summary: Summary | None) -> str:
    return NOTHING if summary is None else f"{short(summary.p50 * 1e3)} ms"
