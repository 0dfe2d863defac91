"""Pure: progress as a full screen of rich text, laid out for whatever room there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.text import Text

from text_generation_launcher.benchmark.charts import Point, bar, curve, histogram
from text_generation_launcher.benchmark.measurements import BatchResult, Summary, summarise
from text_generation_launcher.benchmark.progress import Progress
from text_generation_launcher.benchmark.text import NOTHING, clock, short

NAME = "text-generation-benchmark"
SIDE_BY_SIDE = 76
"""Columns from which two panels stand beside each other."""
_LEAST_HISTOGRAM, _LEAST_CHART = 3, 6
_STATISTICS = 3
_BORDER = 2
_NOTES_FROM = 20
"""Rows of a terminal that has room for notes; they stand under the tables again."""
_DOING_WIDTH = len("warm-up 1 of 1")


@dataclass(frozen=True, slots=True)
class Step:
    """One half of the screen."""

    title: str
    style: str
    values: str
    """Attribute of `BatchResult` with its latencies."""
    rates: str

    def latency(self, result: BatchResult) -> Summary | None:
        return summarise(getattr(result, self.values))

    def rate(self, result: BatchResult) -> Summary | None:
        return summarise(getattr(result, self.rates))


STEPS = (Step("Prefill", "cyan", "prefill_s", "prefill_rates"), Step("Decode", "magenta", "token_s", "decode_rates"))


@dataclass(slots=True)
class Screen:
    """What is on the terminal; a rich renderable that fills it."""

    progress: Progress
    shown: int | None = None
    """The batch size that was chosen by hand; None follows the benchmark."""

    def move(self, by: int) -> None:
        """Show the batch size beside the one on show; at the one that is measured it follows again."""
        sizes = self.progress.config.batch_sizes
        chosen = sizes[min(max(sizes.index(self.on_show) + by, 0), len(sizes) - 1)]
        self.shown = None if chosen == self.progress.batch_size else chosen

    @property
    def on_show(self) -> int:
        progress = self.progress
        if self.shown is not None:
            return self.shown
        if progress.batch_size is not None:
            return progress.batch_size
        return progress.finished[-1] if progress.finished else progress.config.batch_sizes[0]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, options.height or console.height
        rows = self.rows(width, height)
        for number, row in enumerate(rows):
            if number:
                yield Segment.line()
            yield from row.render(console)

    def rows(self, width: int, height: int) -> list[Text]:
        """Exactly ``height`` rows of at most ``width`` characters."""
        head = [*self._head(width, with_notes=height >= _NOTES_FROM), self._tabs(width)]
        foot = self._foot(width)
        room = height - len(head) - 1
        body = self._body(width, room) if room > 0 else []
        rows = (head + body)[: max(height - 1, 0)]
        rows += [Text() for _ in range(height - 1 - len(rows))]
        for row in rows:
            row.truncate(width, overflow="ellipsis")
        return [*rows, foot][-height:] if height else []

    def _head(self, width: int, *, with_notes: bool) -> list[Text]:
        progress, description = self.progress, self.progress.description
        title = Text(NAME, style="bold")
        title.append(f"  {description.model}", style="default")
        about = Text(f"{description.line} · {description.address}", style="dim")
        rows = [title, about]
        if with_notes:
            rows += [Text(f"Note: {note}", style="yellow") for note in description.notes]
        name = f"Batch size {progress.batch_size}" if progress.batch_size is not None else "All batch sizes"
        share = progress.total_share if progress.batch_size is None else progress.share(progress.batch_size)
        rows.append(_progress_row("Total", progress.total_share, clock(progress.elapsed_s), "green", width))
        rows.append(_progress_row(name, share, progress.doing(), "yellow", width))
        return rows

    def _tabs(self, width: int) -> Text:
        """All batch sizes, or as many around the one on show as the row has room for."""
        progress, sizes = self.progress, self.progress.config.batch_sizes
        tabs = []
        for size in sizes:
            mark = "✓" if size in progress.finished else "▸" if size == progress.batch_size else " "
            style = "reverse bold" if size == self.on_show else "green" if size in progress.finished else "default"
            tabs.append(Text(f" {size} {mark} ", style=style))
        first, last = 0, len(tabs)
        while sum(map(len, tabs[first:last])) > width and last - first > 1:
            if sizes.index(self.on_show) - first > last - 1 - sizes.index(self.on_show):
                first += 1
            else:
                last -= 1
        return Text().join(tabs[first:last])

    def _body(self, width: int, room: int) -> list[Text]:
        side_by_side = width >= SIDE_BY_SIDE
        panels, charts = split_room(room, side_by_side=side_by_side)
        widths = (width // 2, width - width // 2) if side_by_side else (width, width)
        result = self.progress.result(self.on_show)
        columns = [_panel(step, result, w, panels) for step, w in zip(STEPS, widths, strict=True)]
        rows = _beside(columns) if side_by_side else [row for column in columns for row in column]
        if charts:
            columns = [_chart(step, self.progress.measured, w, charts) for step, w in zip(STEPS, widths, strict=True)]
            rows += _beside(columns) if side_by_side else [row for column in columns for row in column]
        return rows

    def _foot(self, width: int) -> Text:
        foot = Text(" ← → batch size   q stop, with the tables so far", style="dim")
        foot.truncate(width, overflow="ellipsis")
        return foot


def split_room(room: int, *, side_by_side: bool) -> tuple[int, int]:
    """Rows of one panel and of one chart; charts go first when there is little. 0 is left out."""
    each = room if side_by_side else room // 2
    least_panel, least_chart = _BORDER + _STATISTICS + _LEAST_HISTOGRAM, _BORDER + _LEAST_CHART
    if each < least_panel + least_chart:
        return max(each, 0), 0
    charts = max(least_chart, (each - _STATISTICS) // 2)
    return each - charts, charts


def _progress_row(name: str, share: float, text: str, style: str, width: int) -> Text:
    bar_width = width - 16 - max(len(text), _DOING_WIDTH) - 9
    row = Text(f"{name:<15} ")
    if bar_width >= 8:
        row.append(bar(share, bar_width), style=style).append("▏", style="dim")
        row.append(f"{share:>5.0%}  ")
    return row.append(text, style="bold")


def _panel(step: Step, result: BatchResult, width: int, height: int) -> list[Text]:
    """Statistics and the histogram of one step at one batch size."""
    inner = width - _BORDER
    unit = "ms a token" if step.title == "Decode" else "ms"
    if height < _BORDER + 1 or inner < 8:
        return [Text() for _ in range(height)]
    rows = _statistics(step, result, inner)
    bars = height - _BORDER - len(rows)
    if bars >= _LEAST_HISTOGRAM:
        rows += histogram([value * 1e3 for value in getattr(result, step.values)], inner, bars, step.style)
    title = f"{step.title}, batch size {result.batch_size}, {unit}"
    return _boxed(rows, title, width, height, step.style)


def _statistics(step: Step, result: BatchResult, width: int) -> list[Text]:
    summary, rate = step.latency(result), step.rate(result)
    names = (("average", "lowest", "highest"), ("p50", "p90", "p99"))
    rows = []
    for group in names:
        row = Text()
        for name in group:
            number = NOTHING if summary is None else short(getattr(summary, name) * 1e3)
            cell = Text(f"{name} ", style="dim").append(number, style=f"bold {step.style}")
            cell.pad_right(max(1, width // 3 - len(cell)))
            row.append_text(cell)
        rows.append(row)
    speed = NOTHING if rate is None else short(rate.average)
    rows.append(Text(speed, style=f"bold {step.style}").append(" tokens/s", style="dim"))
    return rows


def _chart(step: Step, results: Sequence[BatchResult], width: int, height: int) -> list[Text]:
    """Average throughput by median latency, a point for each batch size."""
    points = [
        Point(latency.p50 * 1e3, rate.average, str(result.batch_size))
        for result in results
        if (latency := step.latency(result)) and (rate := step.rate(result))
    ]
    rows = curve(points, width - _BORDER, height - _BORDER, step.style, x_unit="ms", y_unit="tokens/s")
    return _boxed(rows, f"{step.title}: throughput by latency", width, height, "dim")


def _boxed(rows: Sequence[Text], title: str, width: int, height: int, style: str) -> list[Text]:
    """``height`` rows with a border around, the title in the upper one."""
    inner = width - _BORDER
    shown = f" {title} " if len(title) + 2 <= inner else title[:inner]
    boxed = [Text(f"╭{shown.ljust(inner, '─')}╮", style=style)]
    for number in range(height - _BORDER):
        row = rows[number].copy() if number < len(rows) else Text()
        row.truncate(inner, overflow="ellipsis", pad=True)
        boxed.append(Text.assemble(("│", style), row, ("│", style)))
    return [*boxed, Text(f"╰{'─' * inner}╯", style=style)]


def _beside(columns: Sequence[list[Text]]) -> list[Text]:
    return [Text.assemble(*row) for row in zip(*columns, strict=True)]
