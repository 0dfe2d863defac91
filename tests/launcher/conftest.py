"""Real processes without a model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

SUPERVISE = str(Path(__file__).with_name("supervise.py"))


class Run:
    """A running launcher of fake children, and the log lines it has printed."""

    def __init__(self, wanted: dict[str, Any], **options: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, SUPERVISE, json.dumps(wanted)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )
        self.lines: list[dict[str, Any]] = []

    def wait_for(self, message: str) -> dict[str, Any]:
        """Read on until a log line contains ``message``."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))
            if message in self.messages[-1]:
                return self.lines[-1]
        raise AssertionError(f"no line {message!r} in:\n" + "\n".join(self.messages) + self.errors)

    def end(self, timeout: float = 20.0) -> int:
        """The exit code, after everything that was printed is read."""
        out, _ = self.process.communicate(timeout=timeout)
        self.lines += [json.loads(line) for line in out.splitlines()]
        return self.process.returncode

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    @property
    def messages(self) -> list[str]:
        return [line["fields"]["message"] if "fields" in line else line["message"] for line in self.lines]

    @property
    def last_error(self) -> str:
        return next(
            m for m, line in zip(self.messages[::-1], self.lines[::-1], strict=True) if line["level"] == "ERROR"
        )

    @property
    def errors(self) -> str:
        assert self.process.stderr is not None
        errors: bytes = self.process.stderr.read()
        return errors.decode()


@pytest.fixture
def run() -> Iterator[Callable[..., Run]]:
    """Start launchers; none of them, nor of their children, is left behind."""
    runs: list[Run] = []

    def start(options: dict[str, Any] | None = None, **wanted: Any) -> Run:
        runs.append(Run(wanted, **(options or {})))
        return runs[-1]

    yield start
    for each in runs:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(each.process.pid).children(recursive=True):
                process.kill()
        each.process.kill()
        each.process.wait()
        for pipe in (each.process.stdout, each.process.stderr):
            assert pipe is not None
            pipe.close()


def text_in(file: Path, timeout_s: float = 20.0) -> str:
    """What a fake child writes to ``file``."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if file.exists() and (text := file.read_text()):
            return text
        time.sleep(0.01)
    raise AssertionError(f"nothing in {file}")


def pid_in(file: Path) -> int:
    """The process id that a fake child writes to ``file``."""
    return int(text_in(file))


def is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.01)
    return True


def wait_until_reaped(pid: int, timeout_s: float = 60.0) -> None:
    """Wait until the parent has taken notice of the end of a process."""
    deadline = time.monotonic() + timeout_s
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


@pytest.fixture
def process() -> Any:
    """The helpers above, for test modules (which cannot import this file)."""
    return sys.modules[__name__]
