"""One child process: its lines, its readiness, its end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections import deque
from typing import Any, cast

from text_generation_proto.lifeline import LIFELINE_FD
from text_generation_proto.logs import UNKNOWN

from text_generation_launcher.logs import LogSink, Record, parse_line
from text_generation_launcher.plan import HubModel, ProcessSpec, Role
from text_generation_launcher.progress import parse_progress

_LONGEST_LINE = 1 << 20
_LAST_OUTPUT_S = 1.0
"""How long to read on after a child's end while a process of another session still holds its pipes."""

Seconds = dict[str, float]


@dataclasses.dataclass(frozen=True, slots=True)
class Loss:
    """The router gets no answer from the shards any more."""

    incarnation: int
    reason: str
    at: float
    """When it was told, on the clock of ``time.monotonic``."""


class Child(asyncio.SubprocessProtocol):
    """A started child. Everything happens on the event loop's thread.

    The thread that starts a child must live as long as the launcher: the kernel's parent-death signal
    comes when that thread ends.
    """

    def __init__(self, spec: ProcessSpec, sink: LogSink) -> None:
        loop = asyncio.get_running_loop()
        self.spec = spec
        self.ready: asyncio.Future[Seconds] = loop.create_future()
        """Duration of each step of the start, in seconds."""
        self.exited: asyncio.Future[int] = loop.create_future()
        """Exit code, or minus the signal's number; set when the last output has been read."""
        self.start_time = self.heard_time = time.monotonic()
        """When it was started, and when it last said something."""
        self.ready_time = self.exit_time = float("inf")
        self.resolved = HubModel()
        """What a download has said about its model."""
        self.losses: asyncio.Queue[Loss] = asyncio.Queue()
        """What a router has said of shards that it has lost."""
        self._sink = sink
        self._last_error: str | None = None
        self._raw: deque[str] = deque(maxlen=50)
        self._partial: dict[int, bytes] = {}
        self._transport: asyncio.SubprocessTransport | None = None

    @classmethod
    async def start(cls, spec: ProcessSpec, sink: LogSink, lifeline: int) -> Child:
        """Start it in a session of its own: Ctrl-C in the terminal reaches the launcher alone."""
        loop = asyncio.get_running_loop()
        _, child = await loop.subprocess_exec(
            lambda: cls(spec, sink),
            *spec.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**spec.env, LIFELINE_FD: str(lifeline)},
            pass_fds=(lifeline,),
            start_new_session=True,
        )
        return child

    @property
    def name(self) -> str:
        return self.spec.role.value

    @property
    def pid(self) -> int:
        assert self._transport is not None
        return self._transport.get_pid()

    @property
    def alive(self) -> bool:
        return self._transport is not None and self._transport.get_returncode() is None

    # -- what asyncio calls ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.SubprocessTransport, transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.heard_time = time.monotonic()
        *lines, rest = (self._partial.pop(fd, b"") + data).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            lines.append(rest)
            rest = b""
        self._partial[fd] = rest
        for line in lines:
            self._on_line(line)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if rest := self._partial.pop(fd, b""):
            self._on_line(rest)

    def process_exited(self) -> None:
        self.exit_time = time.monotonic()
        self.kill_group()  # what it started has no reason to live on, and would hold the pipes
        asyncio.get_running_loop().call_later(_LAST_OUTPUT_S, self._finish)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish()

    def _finish(self) -> None:
        assert self._transport is not None
        if not self.exited.done():
            for fd in list(self._partial):
                self.pipe_connection_lost(fd, None)
            self._sink.end_progress(self.spec.span)
            self.exited.set_result(self._transport.get_returncode() or 0)
            self._transport.close()

    # -- lines --------------------------------------------------------------------------------------

    def _on_line(self, line: bytes) -> None:
        if not line.strip():
            return
        record, structured = parse_line(line, span=self.spec.span, flat=self.spec.role is Role.ROUTER)
        if not structured:
            self._raw.append(record.message)
        elif record.level == "ERROR":
            self._last_error = record.message
        if "event" not in record.fields:
            self._sink.emit(record)
        else:
            self._on_event(record)

    def _on_event(self, record: Record) -> None:
        fields = dict(record.fields)
        event = fields.pop("event")
        if event == "alive":
            return
        if event == "progress" and (progress := parse_progress(fields)):
            self._sink.progress(progress, self.spec.span)
            return
        if event == "ready":
            seconds = _seconds(fields.pop("seconds", None))
            self._sink.end_progress(self.spec.span)
            if not self.ready.done():
                self.ready_time = time.monotonic()
                self.ready.set_result(seconds)
        elif event == "resolved":
            self.resolved = HubModel(
                sha=str(fields.get("sha") or ""), pipeline_tag=str(fields.get("pipeline_tag") or "")
            )
        elif event == "shards_lost":
            self.losses.put_nowait(Loss(int(fields.pop("incarnation", UNKNOWN)), record.message, time.monotonic()))
        self._sink.emit(dataclasses.replace(record, fields=fields))

    # -- its end ------------------------------------------------------------------------------------

    async def terminate(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL when it has not ended ``grace_s`` seconds later. Does nothing to the dead."""
        if not self.alive:
            return
        span = self.spec.span
        self._sink.info(f"Terminating {self.name}", span)
        self.signal(signal.SIGTERM)
        self._sink.info(f"Waiting for {self.name} to gracefully shutdown", span)
        await asyncio.wait([self.exited], timeout=grace_s)
        if self.exited.done():
            self._sink.info(f"{self.name} terminated", span)
            return
        self._sink.info(f"Killing {self.name}", span)
        await self.kill()
        self._sink.info(f"{self.name} killed", span)

    def signal(self, number: signal.Signals) -> None:
        """Send it to the child itself, if it lives."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def kill(self) -> None:
        self.kill_group()
        await asyncio.wait([self.exited])

    def kill_group(self) -> None:
        """SIGKILL to the child and to everything in its process group. Does nothing once `exited` is set."""
        if self.exited.done():
            return  # the number may be another process's by now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def log_end(self) -> None:
        """Tell what is known about an end that nobody asked for."""
        code = self.exited.result()
        if self._last_error is None and self._raw:
            output = "\n".join(self._raw)
            self._sink.error(f"{self.name.capitalize()} complete standard error output:\n{output}", self.spec.span)
        if code < 0:
            self._sink.error(
                f"{self.name.capitalize()} process was signaled to shutdown with signal {-code}", self.spec.span
            )

    @property
    def reason(self) -> str:
        """Why it ended, in one line: a signal, or its own last error if it told one."""
        code = self.exited.result()
        # A signal needs no words of the child; an error it may have told long before has nothing to do with it.
        if code == -signal.SIGKILL:
            return "killed by signal 9; often it is the system that has run out of memory"
        if code < 0:
            return f"killed by signal {-code}"
        if self._last_error is not None:
            return self._last_error.strip().partition("\n")[0]
        return next((line.strip() for line in reversed(self._raw) if line.strip()), f"exit code {code}")


def _seconds(value: Any) -> Seconds:
    if not isinstance(value, dict):
        return {}
    return {str(step): float(spent) for step, spent in value.items() if isinstance(spent, int | float)}
