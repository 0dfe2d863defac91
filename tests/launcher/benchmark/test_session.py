"""How a benchmark runs, and how it ends early."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from text_generation_launcher.benchmark import session
from text_generation_launcher.benchmark.config import BenchmarkConfig, Flags, resolve
from text_generation_launcher.benchmark.errors import BenchmarkError
from text_generation_launcher.benchmark.measurements import Run
from text_generation_launcher.benchmark.progress import Progress
from text_generation_launcher.benchmark.session import End
from text_generation_launcher.benchmark.target import Description, Surprises

CONFIG = resolve(Flags(batch_size=[1, 4], runs=3, warmups=2))


@dataclass
class FakeTarget:
    make_run: Callable[..., Run]
    on_run: Callable[[int], object] = lambda number: None
    description: Description = field(
        default_factory=lambda: Description(kind="fake", address="nowhere", model="m", details={})
    )
    surprises: Surprises = field(default_factory=Surprises)
    sizes: list[int] = field(default_factory=list)
    is_closed: bool = False

    async def run(self, batch_size: int, pause: Callable[[], None]) -> Run:
        self.sizes.append(batch_size)
        self.on_run(len(self.sizes))
        await asyncio.sleep(0)
        return self.make_run(batch_size)

    async def close(self) -> None:
        self.is_closed = True


@dataclass
class FakeView:
    progress: Progress
    stop: Callable[[], object]
    shares: list[float] = field(default_factory=list)
    is_closed: bool = False

    def draw(self) -> None:
        self.shares.append(self.progress.total_share)

    def pause(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


@dataclass
class Bench:
    target: FakeTarget
    views: list[FakeView] = field(default_factory=list)

    async def run(self) -> session.Session:
        return await session.run(CONFIG, self.make_view)

    def make_view(self, progress: Progress, stop: Callable[[], object]) -> FakeView:
        self.views.append(FakeView(progress, stop))
        return self.views[-1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, make_run: Callable[..., Run]) -> Bench:
    target = FakeTarget(make_run)

    async def open_target(config: BenchmarkConfig) -> FakeTarget:
        return target

    monkeypatch.setattr(session, "open_target", open_target)
    return Bench(target)


async def test_warm_ups_are_run_and_left_out(bench: Bench) -> None:
    ended = await bench.run()
    assert ended.end is End.COMPLETE
    assert bench.target.sizes == [1] * 5 + [4] * 5
    assert ended.progress is not None
    assert [(result.batch_size, len(result.runs)) for result in ended.progress.measured] == [(1, 3), (4, 3)]
    [view] = bench.views
    assert view.shares == sorted(view.shares)
    assert (view.shares[0], view.shares[-1]) == (0, 1)
    assert view.is_closed
    assert bench.target.is_closed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_it_with_what_was_measured(bench: Bench, number: signal.Signals) -> None:
    bench.target.on_run = lambda run: os.kill(os.getpid(), number) if run == 8 else None
    ended = await asyncio.create_task(bench.run())
    assert ended.end is End.INTERRUPTED
    assert ended.progress is not None
    assert [result.batch_size for result in ended.progress.measured][:1] == [1]
    assert bench.views[0].is_closed
    assert bench.target.is_closed
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler), "a second one ends it at once"


async def test_the_view_can_end_it(bench: Bench) -> None:
    bench.target.on_run = lambda run: bench.views[0].stop() if run == 4 else None
    ended = await asyncio.create_task(bench.run())
    assert ended.end is End.INTERRUPTED
    assert bench.target.is_closed


async def test_an_error_keeps_what_was_measured_before_it(bench: Bench) -> None:
    def fail(run: int) -> None:
        if run == 9:
            raise BenchmarkError("it broke")

    bench.target.on_run = fail
    ended = await bench.run()
    assert (ended.end, ended.error) == (End.FAILED, "it broke")
    assert ended.progress is not None
    assert [len(result.runs) for result in ended.progress.measured] == [3, 1]
    assert bench.target.is_closed


async def test_a_target_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    async def open_target(config: BenchmarkConfig) -> FakeTarget:
        raise BenchmarkError("nobody there")

    monkeypatch.setattr(session, "open_target", open_target)
    ended = await bench.run()
    assert (ended.end, ended.error, ended.progress) == (End.FAILED, "nobody there", None)
