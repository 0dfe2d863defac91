"""The full screen, at every size of terminal."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from text_generation_launcher.benchmark.config import Flags, resolve
from text_generation_launcher.benchmark.progress import Progress
from text_generation_launcher.benchmark.screen import Screen, split_room
from text_generation_launcher.benchmark.target import Description

MakeProgress = Callable[..., Progress]


def shown(screen: Screen, width: int, height: int) -> list[str]:
    return [row.plain for row in screen.rows(width, height)]


@pytest.mark.parametrize(("width", "height"), [(40, 24), (40, 60), (80, 24), (80, 12), (200, 50)])
@pytest.mark.parametrize(("finished", "runs"), [(0, 0), (0, 1), (2, 3), (6, 0)])
def test_it_fills_the_terminal_exactly(
    make_progress: MakeProgress, width: int, height: int, finished: int, runs: int
) -> None:
    rows = Screen(make_progress(finished, runs)).rows(width, height)
    assert len(rows) == height
    assert all(row.cell_len <= width for row in rows)
    text = "\n".join(row.plain for row in rows)
    assert "Total" in text
    assert "Prefill" in text
    assert "Decode" in text
    assert "q stop" in text.splitlines()[-1]


@given(width=st.integers(1, 250), height=st.integers(1, 80))
def test_no_size_is_too_small(width: int, height: int) -> None:
    progress = Progress(resolve(Flags()), Description(kind="k", address="a", model="m" * 300, details={}))
    progress.begin(1)
    rows = Screen(progress).rows(width, height)
    assert len(rows) == height
    assert all(row.cell_len <= width for row in rows)


def test_panels_stand_side_by_side_where_there_is_room(make_progress: MakeProgress) -> None:
    screen = Screen(make_progress(1, 2))
    wide, narrow = shown(screen, 80, 24), shown(screen, 40, 40)
    assert any("Prefill, batch" in row and "Decode, batch" in row for row in wide)
    assert not any("Prefill, batch" in row and "Decode, batch" in row for row in narrow)
    assert any("throughput by latency" in row for row in wide)


def test_what_is_shown_of_a_batch_size(make_progress: MakeProgress) -> None:
    text = "\n".join(shown(Screen(make_progress(1, 3)), 120, 40))
    for part in ("batch size 2", "run 4 of 10", "average 21.0", "p50 21.0", "lowest 20.0", "tokens/s", "23%"):
        assert part in text, part


def test_arrows_choose_a_batch_size_and_come_back(make_progress: MakeProgress) -> None:
    screen = Screen(make_progress(2, 1))
    assert (screen.on_show, screen.shown) == (4, None)
    screen.move(-1)
    assert (screen.on_show, screen.shown) == (2, 2)
    screen.progress.begin(8)
    assert screen.on_show == 2, "what was chosen stays"
    screen.move(-9)
    assert screen.on_show == 1
    screen.move(3)
    assert (screen.on_show, screen.shown) == (8, None), "it follows again"
    screen.move(9)
    assert screen.on_show == 32


def test_a_row_of_many_tabs_shows_the_chosen_one(make_progress: MakeProgress) -> None:
    screen = Screen(make_progress(0, 1, batch_size=list(range(100, 140))))
    for _ in range(40):
        tabs = shown(screen, 40, 24)[4]
        assert f" {screen.on_show} " in tabs
        screen.move(1)


def test_charts_give_way_first() -> None:
    assert split_room(40, side_by_side=True) == (22, 18)
    assert split_room(12, side_by_side=True) == (12, 0)
    assert split_room(24, side_by_side=False) == (12, 0)


def test_rich_draws_it_as_it_is(make_progress: MakeProgress) -> None:
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system="truecolor")
    screen = Screen(make_progress(2, 1))
    with console.capture() as capture:
        console.print(screen, end="")
    plain = Console(file=io.StringIO(), width=80, height=24)
    with plain.capture() as text:
        plain.print(screen, end="")
    assert text.get().splitlines() == [row.rstrip("\n") for row in shown(screen, 80, 24)]
    assert "\x1b[" in capture.get()
