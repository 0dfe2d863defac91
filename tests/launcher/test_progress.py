from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Callable

import pytest
from text_generation_launcher.progress import Bars, Progress, Span, StepLines, amount, parse_progress

RANK_0: Span = {"rank": 0, "name": "shard-manager"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def render(text: str, span: Span) -> str:
    return text


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (1_500_000_000, "bytes", "1.5 GB"),
        (2048, "bytes", "2.0 kB"),
        (12, "bytes", "12 bytes"),
        (30, "layers", "30 layers"),
    ],
)
def test_amounts(number: float, unit: str, text: str) -> None:
    assert amount(number, unit) == text


def test_lines_come_seldom_and_once_at_the_end() -> None:
    lines: list[str] = []
    clock = Clock()
    steps = StepLines(lines.append, render, clock=clock)
    for second in range(12):
        clock.now = float(second)
        steps.progress(Progress("download", second * 1e6, 11e6, "bytes"), None)
    assert lines == [
        "Download: 5.0 MB of 11.0 MB (45%)",
        "Download: 10.0 MB of 11.0 MB (91%)",
        "Download: 11.0 MB in 11.0 s",
    ]


def test_ranks_are_told_apart() -> None:
    lines: list[str] = []
    steps = StepLines(lines.append, lambda text, span: f"{span}: {text}")
    for rank in (0, 1):
        steps.progress(Progress("load", 2, 2, "parts"), {"rank": rank})
    assert lines == ["{'rank': 0}: Load: 2 parts", "{'rank': 1}: Load: 2 parts"]


def test_an_unknown_total_has_no_share() -> None:
    assert str(Progress("download", 5e6, None, "bytes")) == "Download: 5.0 MB"
    assert not Progress("download", 5e6, 0, "bytes").finished


def test_malformed_events_are_no_progress() -> None:
    assert parse_progress({"stage": "load", "done": "3", "total": 4}) is None
    assert parse_progress({"stage": "load", "done": 3, "total": 4, "unit": "parts"}) == Progress("load", 3, 4, "parts")


def test_files_that_are_downloaded_side_by_side_are_told_apart() -> None:
    progress = parse_progress({"stage": "download", "file": "Model-1.safetensors", "done": 3, "total": 3})
    assert progress is not None
    assert progress.ended(0.0) == "Download Model-1.safetensors: 3"


def refreshing() -> bool:
    return any("Refresh" in type(thread).__name__ for thread in threading.enumerate())


def ends(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not condition()


def test_bars_end_as_plain_lines_and_leave_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines: list[str] = []
    bars = Bars(lines.append, render, clock=Clock())
    bars.line("before")
    bars.progress(Progress("load", 1, 2, "parts"), RANK_0)
    bars.line("\x1b[31mmeanwhile\x1b[0m")
    bars.progress(Progress("load", 2, 2, "parts"), RANK_0)
    bars.line("after")
    assert lines == ["before", "Load: 2 parts", "after"]
    assert "meanwhile" in terminal.getvalue()
    assert ends(refreshing)


def test_a_bar_that_never_fills_goes_with_its_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    bars = Bars(list[str]().append, render)
    bars.progress(Progress("download", 1, None, "bytes"), RANK_0)
    bars.progress(Progress("load", 1, None, "parts"), RANK_0)
    assert refreshing()
    bars.end_progress(RANK_0)
    assert ends(refreshing)
    bars.close()
