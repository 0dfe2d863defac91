"""Latency and throughput by batch size as a picture; the one file that needs matplotlib, which is an extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from text_generation_launcher.benchmark.measurements import BatchResult, summarise
from text_generation_launcher.benchmark.tables import LATENCIES, RATES

PANELS = (("Prefill", "Prefill", "Prefill"), ("Decode (token)", "Decode", "Decode"))
"""Latency, rate, title."""


def plot(results: Sequence[BatchResult], title: str, path: Path) -> None:
    """Write the picture in the format of the path's ending. ``results``: at least one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(11, 8.2), layout="constrained")
    for row, (latency, rate, name) in zip(grid, PANELS, strict=True):
        _draw_latency(row[0], results, latency, name)
        _draw_trade(row[1], results, latency, rate, name)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_latency(axes: Any, results: Sequence[BatchResult], latency: str, name: str) -> None:
    """Median and spread by batch size."""
    found = [(result.batch_size, summary) for result in results if (summary := summarise(LATENCIES[latency](result)))]
    sizes = [size for size, _ in found]
    axes.fill_between(
        sizes,
        [summary.lowest * 1e3 for _, summary in found],
        [summary.p99 * 1e3 for _, summary in found],
        alpha=0.2,
        label="lowest to p99",
    )
    axes.plot(sizes, [summary.p50 * 1e3 for _, summary in found], marker="o", label="p50")
    axes.set(title=f"{name}: latency by batch size", xlabel="batch size", ylabel="ms", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_trade(axes: Any, results: Sequence[BatchResult], latency: str, rate: str, name: str) -> None:
    """What a batch size gains in throughput on average, and what it costs in median latency."""
    points = [
        (result.batch_size, time.p50 * 1e3, speed.average)
        for result in results
        if (time := summarise(LATENCIES[latency](result))) and (speed := summarise(RATES[rate](result)))
    ]
    axes.plot([x for _, x, _ in points], [y for _, _, y in points], marker="o", color="tab:orange")
    for size, x, y in points:
        axes.annotate(str(size), (x, y), textcoords="offset points", xytext=(5, 6))
    axes.set(title=f"{name}: throughput by latency, for each batch size", xlabel="ms, p50", ylabel="tokens/s")
    axes.margins(0.1)  # room for the labels
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
