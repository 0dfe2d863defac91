"""How far a benchmark has come, and all that it has measured: what views show and tables sum up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from text_generation_launcher.benchmark.config import BenchmarkConfig
from text_generation_launcher.benchmark.measurements import BatchResult, Run
from text_generation_launcher.benchmark.target import Description


@dataclass(slots=True)
class Progress:
    config: BenchmarkConfig
    description: Description
    clock: Callable[[], float] = time.monotonic
    batch_size: int | None = None
    """The one that is measured; None before the first and behind the last."""
    num_warmups: int = 0
    """Done at this batch size."""
    finished: list[int] = field(default_factory=list)
    """Batch sizes that are done."""
    _results: dict[int, BatchResult] = field(init=False)
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._results = {size: BatchResult(size) for size in self.config.batch_sizes}
        self._started = self.clock()

    def begin(self, batch_size: int) -> None:
        self.batch_size, self.num_warmups = batch_size, 0

    def warmed_up(self) -> None:
        self.num_warmups += 1

    def add(self, run: Run) -> None:
        self._results[run.batch_size].runs.append(run)

    def finish(self) -> None:
        """The current batch size is done."""
        assert self.batch_size is not None, "begin comes first"
        self.finished.append(self.batch_size)
        self.batch_size = None

    def result(self, batch_size: int) -> BatchResult:
        return self._results[batch_size]

    @property
    def measured(self) -> list[BatchResult]:
        """Batch sizes with at least one run, in ascending order."""
        return [result for result in self._results.values() if result.runs]

    @property
    def elapsed_s(self) -> float:
        return self.clock() - self._started

    @property
    def total_share(self) -> float:
        """Of all batches, warm-ups included; 0 to 1."""
        each = self.config.runs + self.config.warmups
        done = len(self.finished) * each
        if self.batch_size is not None:
            done += self.num_warmups + len(self.result(self.batch_size).runs)
        return done / (each * len(self.config.batch_sizes))

    def share(self, batch_size: int) -> float:
        """Of the runs at one batch size; 0 to 1."""
        return len(self.result(batch_size).runs) / self.config.runs

    def doing(self) -> str:
        """The next thing, in words."""
        if self.batch_size is None:
            return "done" if self.finished else "starting"
        if self.num_warmups < self.config.warmups:
            return f"warm-up {self.num_warmups + 1} of {self.config.warmups}"
        runs = len(self.result(self.batch_size).runs)
        return f"run {min(runs + 1, self.config.runs)} of {self.config.runs}"
