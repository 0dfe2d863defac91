"""What was measured as Markdown: TGI's three tables, and what a reader has to know beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from text_generation_launcher.benchmark.config import BenchmarkConfig
from text_generation_launcher.benchmark.measurements import BatchResult, Summary, summarise
from text_generation_launcher.benchmark.target import Description, Surprises
from text_generation_launcher.benchmark.text import NOTHING, milliseconds, tokens_per_second

LATENCIES: dict[str, Callable[[BatchResult], list[float]]] = {
    "Prefill": lambda result: result.prefill_s,
    "Decode (token)": lambda result: result.token_s,
    "Decode (total)": lambda result: result.decode_s,
}
RATES: dict[str, Callable[[BatchResult], list[float]]] = {
    "Prefill": lambda result: result.prefill_rates,
    "Prefill (prompt)": lambda result: result.prompt_rates,
    "Decode": lambda result: result.decode_rates,
}
_LATENCY_HEAD = ["Step", "Batch Size", "Average", "Lowest", "Highest", "p50", "p90", "p99"]
_RATE_HEAD = ["Step", "Batch Size", "Average", "Lowest", "Highest"]


def report(
    config: BenchmarkConfig, description: Description, surprises: Surprises, results: Sequence[BatchResult]
) -> str:
    """All tables; ends with a newline."""
    parts = [
        parameter_table(config, description),
        latency_table(results),
        throughput_table(results),
        *notes(config, description, surprises, results),
    ]
    return "\n\n".join(parts) + "\n"


def parameter_table(config: BenchmarkConfig, description: Description) -> str:
    sampling = config.sampling
    rows = [
        ["Model", description.model],
        ["Measured", f"{description.kind} at {description.address}"],
        *([name, value] for name, value in description.details.items()),
        ["Sequence Length", str(config.sequence_length)],
        ["Decode Length", str(config.decode_length)],
        ["Top N Tokens", _given(sampling.top_n_tokens)],
        ["N Runs", str(config.runs)],
        ["Warmups", str(config.warmups)],
        ["Temperature", _given(sampling.temperature)],
        ["Top K", _given(sampling.top_k)],
        ["Top P", _given(sampling.top_p)],
        ["Typical P", _given(sampling.typical_p)],
        ["Repetition Penalty", _given(sampling.repetition_penalty)],
        ["Frequency Penalty", _given(sampling.frequency_penalty)],
        ["Watermark", str(sampling.watermark).lower()],
        ["Do Sample", str(sampling.do_sample).lower()],
    ]
    return table(["Parameter", "Value"], rows)


def latency_table(results: Sequence[BatchResult]) -> str:
    rows = []
    for step, values in LATENCIES.items():
        for number, result in enumerate(results):
            cells = _latency_cells(summarise(values(result)))
            rows.append([step if number == 0 else "", str(result.batch_size), *cells])
    return table(_LATENCY_HEAD, rows, num_left=1)


def throughput_table(results: Sequence[BatchResult]) -> str:
    rows = []
    for step, values in RATES.items():
        for number, result in enumerate(results):
            summary = summarise(values(result))
            numbers = (None, None, None) if summary is None else (summary.average, summary.lowest, summary.highest)
            cells = [tokens_per_second(number) for number in numbers]
            rows.append([step if number == 0 else "", str(result.batch_size), *cells])
    return table(_RATE_HEAD, rows, num_left=1)


def notes(
    config: BenchmarkConfig, description: Description, surprises: Surprises, results: Sequence[BatchResult]
) -> list[str]:
    """One paragraph for each thing that keeps the numbers from being what they seem."""
    texts = list(description.notes)
    if surprises.num_short:
        texts.append(
            f"{surprises.num_short} of {surprises.num_streams} streams ended before {config.decode_length} tokens: "
            "behind their ends the batches were smaller than they are called. `Decode (total)` leaves these out."
        )
    if others := sorted(surprises.prompt_tokens - {config.sequence_length}):
        counted = f"{others[0]}" if len(others) == 1 else f"{others[0]} to {others[-1]}"
        texts.append(f"The server counts {counted} tokens in prompts of {config.sequence_length}.")
    unfinished = [
        f"{result.batch_size} ({len(result.runs)} of {config.runs} runs)"
        for result in results
        if len(result.runs) < config.runs
    ]
    missing = [str(size) for size in config.batch_sizes if size not in {result.batch_size for result in results}]
    if unfinished or missing:
        texts.append("Not complete: batch size " + ", ".join(unfinished + [f"{size} (nothing)" for size in missing]))
    return texts


def table(head: Sequence[str], rows: Sequence[Sequence[str]], num_left: int | None = None) -> str:
    """A Markdown table with aligned columns; behind the first ``num_left`` they are numbers. None: all are text."""
    cells = [[_escaped(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    left = [num_left is None or column < num_left for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(row, widths, left, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width + 2) if is_left else "-" * (width + 1) + ":" for width, is_left in zip(widths, left, strict=True)
    ]
    return "\n".join([line(cells[0]), f"|{'|'.join(rule)}|", *map(line, cells[1:])])


def _latency_cells(summary: Summary | None) -> list[str]:
    if summary is None:
        return [NOTHING] * 6
    numbers = (summary.average, summary.lowest, summary.highest, summary.p50, summary.p90, summary.p99)
    return [milliseconds(number) for number in numbers]


def _given(value: float | None) -> str:
    return "None" if value is None else f"{value:g}"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
