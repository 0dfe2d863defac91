"""Lines where nobody watches, keys where somebody does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from text_generation_launcher.benchmark.keyboard import Key, parse
from text_generation_launcher.benchmark.progress import Progress
from text_generation_launcher.benchmark.views import Lines, make_view, summary_line


def test_without_a_terminal_progress_is_lines(
    make_progress: Callable[..., Progress], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = make_progress(1, 2, batch_size=[1, 2, 4])
    view = make_view(progress, lambda: None)
    assert isinstance(view, Lines)
    view.draw()
    view.close()
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first == "org/model: shard · bfloat16 · cpu at /tmp/text-generation-server-0"
    assert second.startswith("batch size 1: prefill 14.5 ms, decode 3.00 ms a token, 333 tokens/s")


def test_a_long_batch_size_gives_a_sign_every_few_seconds(
    make_progress: Callable[..., Progress], capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    view = Lines(make_progress(0, 3), clock=lambda: now)
    capsys.readouterr()
    for now in (1.0, 4.0, 6.0, 7.0, 12.0):  # noqa: B007  # read by the clock
        view.draw()
    assert capsys.readouterr().err.splitlines() == ["batch size 1: run 4 of 10, 0:00"] * 2


def test_a_line_without_decode_steps(make_progress: Callable[..., Progress]) -> None:
    progress = make_progress(1, decode_length=1)
    for run in progress.result(1).runs:
        object.__setattr__(run, "token_s", ())
    assert summary_line(progress, 1) == "batch size 1: prefill 14.5 ms (p50, average rate)"


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"\x1b[D\x1b[C", [Key.LEFT, Key.RIGHT]),
        (b"\x1bOC", [Key.RIGHT]),
        (b"hlq", [Key.LEFT, Key.RIGHT, Key.QUIT]),
        (b"x\x1b[Ayq", [Key.QUIT]),
        (b"", []),
    ],
)
def test_keys(data: bytes, keys: list[Key]) -> None:
    assert parse(data) == keys
