"""Charts are exactly as large as asked, whatever they show."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text
from text_generation_launcher.benchmark.charts import Point, bar, bins, curve, histogram

NUMBERS = st.floats(0, 1e7)


def plain(rows: list[Text]) -> list[str]:
    return [row.plain for row in rows]


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0, "    "), (1, "████"), (0.5, "██  "), (0.03, "▏   "), (1e-9, "▏   "), (0.65, "██▋ ")],
)
def test_bars(share: float, expected: str) -> None:
    assert bar(share, 4) == expected


def test_bins_hold_every_value_once() -> None:
    assert bins([1, 1, 2, 5], 4) == ([2, 1, 0, 1], [1, 2, 3, 4])
    assert bins([3, 3, 3], 4) == ([3], [3])
    assert len(bins(list(range(9)), 40)[0]) == 6, "few bins of few values"


@given(values=st.lists(NUMBERS, min_size=1), most=st.integers(1, 20))
def test_no_value_falls_out_of_the_bins(values: list[float], most: int) -> None:
    counts, starts = bins(values, most)
    assert sum(counts) == len(values)
    assert len(counts) == len(starts) <= most


def test_a_histogram_names_its_ranges_and_counts() -> None:
    assert plain(histogram([1.0, 1.0, 1.1, 3.0], 20, 4, "red")) == [
        "  1.00 │██████████ 3",
        "  1.50 │            ",
        "  2.00 │            ",
        "  2.50 │███▍       1",
    ]


@given(values=st.lists(NUMBERS, max_size=50), width=st.integers(1, 90), height=st.integers(0, 20))
def test_histograms_keep_their_size(values: list[float], width: int, height: int) -> None:
    rows = histogram(values, width, height, "red")
    assert len(rows) == height
    assert all(row.cell_len == width for row in rows)


@given(points=st.lists(st.tuples(NUMBERS, NUMBERS), max_size=8), width=st.integers(1, 90), height=st.integers(0, 30))
def test_curves_keep_their_size(points: list[tuple[float, float]], width: int, height: int) -> None:
    named = [Point(x, y, str(2**number)) for number, (x, y) in enumerate(points)]
    rows = curve(named, width, height, "red", x_unit="ms", y_unit="tokens/s")
    assert len(rows) == height
    assert all(row.cell_len == width for row in rows)


def test_a_curve_rises_to_the_right_and_names_its_points() -> None:
    rows = plain(curve([Point(1, 1, "1"), Point(9, 9, "32")], 40, 12, "red", x_unit="ms", y_unit="tokens/s"))
    [first] = [number for number, row in enumerate(rows) if "●1" in row]
    [last] = [number for number, row in enumerate(rows) if "●32" in row or "32●" in row]
    assert last < first
    assert rows[last].index("●") > rows[first].index("●")
    assert rows[-1].startswith("tokens/s")
    assert rows[-1].endswith(" ms")
