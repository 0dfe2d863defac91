"""The Markdown that is printed at the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from text_generation_launcher.benchmark.measurements import BatchResult, Run
from text_generation_launcher.benchmark.progress import Progress
from text_generation_launcher.benchmark.tables import (
    latency_table,
    notes,
    parameter_table,
    report,
    table,
    throughput_table,
)
from text_generation_launcher.benchmark.target import Surprises


def cells(markdown: str) -> list[list[str]]:
    """Rows of a table, head included, rule left out."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in markdown.splitlines()]
    return [[cell.strip() for cell in row] for row in rows[:1] + rows[2:]]


def test_columns_are_aligned_and_bars_escaped() -> None:
    markdown = table(["a", "number"], [["x|y", "1"], ["z", "22"]], num_left=1)
    assert markdown.splitlines() == [
        "| a    | number |",
        "|------|-------:|",
        "| x\\|y |      1 |",
        "| z    |     22 |",
    ]


def test_latencies_by_step_and_batch_size(make_run: Callable[..., Run]) -> None:
    results = [BatchResult(size, [make_run(size, prefill_ms=10 * size, token_ms=(2, 4))]) for size in (1, 2)]
    head, *rows = cells(latency_table(results))
    assert head == ["Step", "Batch Size", "Average", "Lowest", "Highest", "p50", "p90", "p99"]
    assert [row[:2] for row in rows] == [
        *(["Prefill", "1"], ["", "2"]),
        *(["Decode (token)", "1"], ["", "2"]),
        *(["Decode (total)", "1"], ["", "2"]),
    ]
    assert rows[0][2:] == ["10.00 ms"] * 6
    assert rows[2][2:5] == ["3.00 ms", "2.00 ms", "4.00 ms"]
    assert rows[4][2] == "6.00 ms"


def test_throughput_by_step_and_batch_size(make_run: Callable[..., Run]) -> None:
    head, *rows = cells(throughput_table([BatchResult(2, [make_run(2, prefill_ms=10, token_ms=(2, 2))])]))
    assert head == ["Step", "Batch Size", "Average", "Lowest", "Highest"]
    assert [row[0] for row in rows] == ["Prefill", "Prefill (prompt)", "Decode"]
    assert [row[2] for row in rows] == ["200.00 tokens/s", "2000.00 tokens/s", "1000.00 tokens/s"]


def test_what_was_not_measured_is_a_dash(make_run: Callable[..., Run]) -> None:
    result = BatchResult(1, [make_run(1, token_ms=())])
    assert cells(latency_table([result]))[2] == ["Decode (token)", "1", *["-"] * 6]
    assert cells(throughput_table([result]))[3] == ["Decode", "1", "-", "-", "-"]


def test_every_parameter_is_listed(make_progress: Callable[..., Progress]) -> None:
    progress = make_progress(temperature=0.5, top_n_tokens=2)
    rows = {name: value for name, value in cells(parameter_table(progress.config, progress.description))}
    for name in ("Model", "Sequence Length", "Decode Length", "N Runs", "Warmups", "Top K", "Top P", "Typical P"):
        assert name in rows
    assert (rows["Temperature"], rows["Top N Tokens"], rows["Do Sample"]) == ("0.5", "2", "false")
    assert rows["Repetition Penalty"] == rows["Frequency Penalty"] == "None"


@pytest.mark.parametrize(
    ("finished", "runs", "surprises", "expected"),
    [
        pytest.param(2, 0, Surprises(), [], id="nothing to say"),
        pytest.param(
            1, 3, Surprises(), ["Not complete: batch size 2 (3 of 10 runs)"], id="stopped within a batch size"
        ),
        pytest.param(1, 0, Surprises(), ["Not complete: batch size 2 (nothing)"], id="stopped before one"),
        pytest.param(
            2,
            0,
            Surprises(num_streams=9, num_short=2, prompt_tokens={10, 34}),
            ["2 of 9 streams ended before 8 tokens", "The server counts 34 tokens in prompts of 10."],
            id="a server that ends early and counts otherwise",
        ),
    ],
)
def test_what_keeps_the_numbers_from_being_what_they_seem_is_said(
    make_progress: Callable[..., Progress], finished: int, runs: int, surprises: Surprises, expected: list[str]
) -> None:
    progress = make_progress(finished, runs, batch_size=[1, 2])
    said = notes(progress.config, progress.description, surprises, progress.measured)
    assert len(said) == len(expected)
    for text, start in zip(said, expected, strict=True):
        assert text.startswith(start)


def test_the_report_is_three_tables(make_progress: Callable[..., Progress]) -> None:
    progress = make_progress(2, batch_size=[1, 2])
    text = report(progress.config, progress.description, Surprises(), progress.measured)
    assert text.count("\n\n") == 2
    assert text.endswith("|\n")
