"""What the tests of the benchmark tool share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from builders import byte_tokenizer
from text_generation_launcher.benchmark.config import BenchmarkConfig, Flags, resolve
from text_generation_launcher.benchmark.measurements import Run
from text_generation_launcher.benchmark.progress import Progress
from text_generation_launcher.benchmark.target import Description


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose tokenizer has one id a byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def a_run(batch_size: int, *, prefill_ms: float = 10, token_ms: tuple[float, ...] = (2, 3, 4)) -> Run:
    """As a shard gives it, with prompts of 10 tokens."""
    token_s = tuple(value / 1e3 for value in token_ms)
    return Run(
        batch_size=batch_size,
        prefill_s=(prefill_ms / 1e3,),
        token_s=token_s,
        decode_s=(sum(token_s),) if token_s else (),
        prompt_tokens=10 * batch_size,
        decode_tokens=batch_size * len(token_s),
        prefill_wall_s=prefill_ms / 1e3,
        decode_wall_s=sum(token_s),
    )


def progress_of(config: BenchmarkConfig, *, finished: int = 0, runs: int = 0) -> Progress:
    """``finished`` batch sizes done, and so many ``runs`` of the next."""
    description = Description(
        kind="shard",
        address="/tmp/text-generation-server-0",
        model="org/model",
        details={"Dtype": "bfloat16", "Device": "cpu"},
    )
    progress = Progress(config, description, clock=lambda: 0.0)
    for number, batch_size in enumerate(config.batch_sizes[: finished + 1]):
        is_finished = number < finished
        if not is_finished and not runs:
            break
        progress.begin(batch_size)
        for _ in range(config.warmups):
            progress.warmed_up()
        for index in range(config.runs if is_finished else runs):
            progress.add(a_run(batch_size, prefill_ms=10 * batch_size + index))
        if is_finished:
            progress.finish()
    return progress


@pytest.fixture
def make_run() -> Callable[..., Run]:
    return a_run


@pytest.fixture
def make_progress() -> Callable[..., Progress]:
    """``make_progress(finished=1, runs=3, batch_size=[1, 2], ...)``: the rest are flags."""

    def make(finished: int = 0, runs: int = 0, **flags: object) -> Progress:
        return progress_of(resolve(Flags(**flags)), finished=finished, runs=runs)  # type: ignore[arg-type]

    return make
