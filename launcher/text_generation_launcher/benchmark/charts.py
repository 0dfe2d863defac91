"""Pure: charts made of characters, as rows of rich text that are exactly as wide and high as asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.text import Text

from text_generation_launcher.benchmark.text import short

_EIGHTHS = " ▏▎▍▌▋▊▉"
_FULL = "█"
_BRAILLE = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each dot of a braille character, by row and column."""
_LABEL_WIDTH = 6


@dataclass(frozen=True, slots=True)
class Point:
    x: float
    y: float
    label: str


def bar(share: float, width: int) -> str:
    """``share`` (0 to 1) of ``width`` characters, to an eighth of one; what is there at all is visible."""
    eighths = round(share * width * 8)
    if share > 0:
        eighths = max(eighths, 1)
    full, rest = divmod(min(eighths, width * 8), 8)
    return (_FULL * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def histogram(values: Sequence[float], width: int, height: int, style: str) -> list[Text]:
    """How often which value came: one bar a row, labelled with where its range begins, and the count behind it."""
    if not values or height < 1 or width < _LABEL_WIDTH + 4:
        return [Text(" " * width) for _ in range(height)]
    counts, starts = bins(values, height)
    most = max(counts)
    count_width = len(str(most))
    bar_width = width - _LABEL_WIDTH - count_width - 3
    rows = []
    for start, count in zip(starts, counts, strict=True):
        row = Text(f"{short(start):>{_LABEL_WIDTH}} ", style="dim")
        row.append("│", style="dim")
        row.append(bar(count / most, bar_width), style=style)
        row.append(f" {count or '':>{count_width}}", style="dim")
        rows.append(row)
    return rows + [Text(" " * width) for _ in range(height - len(rows))]


def bins(values: Sequence[float], most: int) -> tuple[list[int], list[float]]:
    """Counts of equal ranges from the lowest to the highest value, and where each begins.

    At most ``most`` ranges, and few of few values: a histogram of gaps says nothing.
    """
    low, high = min(values), max(values)
    number = min(most, math.ceil(2 * math.sqrt(len(values)))) if high > low else 1
    size = (high - low) / number
    counts = [0] * number
    for value in values:
        counts[min(int((value - low) / size), number - 1) if size else 0] += 1
    return counts, [low + index * size for index in range(number)]


def curve(points: Sequence[Point], width: int, height: int, style: str, *, x_unit: str, y_unit: str) -> list[Text]:
    """Points joined by a line, both axes from 0; a label stands beside its point."""
    columns, lines = width - _LABEL_WIDTH - 1, height - 2
    if not points or columns < 10 or lines < 2:
        return [Text(" " * width) for _ in range(height)]
    canvas = _Canvas(columns, lines)
    x_top, y_top = (max(max(values), 1e-9) * 1.08 for values in ([p.x for p in points], [p.y for p in points]))
    places = [canvas.place(point.x / x_top, point.y / y_top) for point in points]
    for start, end in pairwise(places):
        canvas.line(start, end)
    rows = [Text(text, style=style) for text in canvas.rows()]
    for point, place in zip(points, places, strict=True):
        _mark(rows, point.label, place[0] // 2, place[1] // 4, columns)
    labelled = []
    for index, row in enumerate(rows):
        label = short(y_top) if index == 0 else short(y_top / 2) if index == lines // 2 else ""
        text = Text(f"{label:>{_LABEL_WIDTH}}", style="dim").append("│", style="dim")
        labelled.append(text.append_text(row))
    axis = Text(" " * _LABEL_WIDTH + "└" + "─" * columns, style="dim")
    return [*labelled, axis, _x_axis(columns, x_top, x_unit, y_unit)]


def _x_axis(columns: int, x_top: float, x_unit: str, y_unit: str) -> Text:
    right = f"{short(x_top)} {x_unit}"
    left = y_unit if _LABEL_WIDTH + 1 + columns >= len(y_unit) + len(right) + 2 else ""
    text = left.ljust(_LABEL_WIDTH + 1 + columns - len(right)) + right
    return Text(text[: _LABEL_WIDTH + 1 + columns], style="dim")


def _mark(rows: list[Text], label: str, column: int, line: int, columns: int) -> None:
    """Put a point into a row of characters, and its label beside it: to the right where that has room."""
    written = f"●{label}" if column + 1 + len(label) <= columns else f"{label}●"
    start = min(column, columns - len(written)) if written[0] == "●" else max(0, column - len(label))
    row = rows[line]
    text = row.plain
    spans = [*row.spans]
    rows[line] = Text(text[:start] + written + text[start + len(written) :], style=row.style, spans=spans)
    rows[line].stylize("bold default", start, start + len(written))


class _Canvas:
    """A grid of dots, eight to a character."""

    def __init__(self, columns: int, lines: int) -> None:
        self._cells = [[0] * columns for _ in range(lines)]
        self._width, self._height = columns * 2, lines * 4

    def place(self, x: float, y: float) -> tuple[int, int]:
        """The dot of shares of both axes, y upwards."""
        return (
            min(int(x * self._width), self._width - 1),
            min(max(int((1 - y) * self._height), 0), self._height - 1),
        )

    def line(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
        for step in range(steps + 1):
            x = round(start[0] + (end[0] - start[0]) * step / steps)
            y = round(start[1] + (end[1] - start[1]) * step / steps)
            self._cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]

    def rows(self) -> list[str]:
        return ["".join(chr(_BRAILLE + cell) if cell else " " for cell in line) for line in self._cells]
