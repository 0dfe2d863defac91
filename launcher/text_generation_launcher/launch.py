"""One launch, from checked flags to the exit code: the only place that joins the parts."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import secrets
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from text_generation_launcher.config import LauncherConfig, resolve
from text_generation_launcher.devices import find_devices
from text_generation_launcher.errors import ArgumentValidation, LauncherError, NotEnoughCUDADevices
from text_generation_launcher.flags import Flags
from text_generation_launcher.logs import Display, LogSink, Record, own_level, render_json, render_text
from text_generation_launcher.memory_plan import print_plan
from text_generation_launcher.plan import Launch, make_plan
from text_generation_launcher.process import Seconds
from text_generation_launcher.progress import Bars, StepLines
from text_generation_launcher.report import (
    given_arguments,
    ready_text,
    runtime_report,
    step_times,
    url,
)
from text_generation_launcher.sockets import check_port, free_port, socket_path
from text_generation_launcher.supervisor import Supervisor, stop_signals

STDOUT = 1


def launch(flags: Flags, environ: Mapping[str, str], warnings: Sequence[str]) -> int:
    """Run the server until it is told to stop, or print its plan; returns the exit code."""
    if flags.plan:
        return print_plan(flags, environ)
    for number in stop_signals():
        # Until the supervisor takes over there is nothing to stop: a clean end.
        signal.signal(number, lambda *_: sys.exit(0))
    sink = open_sink(flags, environ)
    code = 1
    try:
        code = _launch(flags, environ, warnings, sink)
    except LauncherError as error:
        code = error.exit_code
        _report(error, sink, json_output=flags.json_output)
    finally:
        if not sink.close():
            # Nobody takes our last lines: the interpreter's own flush at exit would wait for ever.
            os._exit(code)
    return code


def _launch(flags: Flags, environ: Mapping[str, str], warnings: Sequence[str], sink: LogSink) -> int:
    if flags.env:
        sink.info(runtime_report(environ))
    sink.info(f"Args: {given_arguments(flags)}")
    config = resolve(flags, find_devices(environ))
    for warning in (*warnings, *config.warnings):
        sink.warning(warning)
    if flags.disable_custom_kernels:
        sink.info("`--disable-custom-kernels`: PyTorch's own operators only (attention torch)")
    if flags.api_key is None and (empty := [name for name in ("TGI_API_KEY", "API_KEY") if name in environ]):
        sink.warning(f"{empty[0]} is empty: the server is open")
    check_port(config.hostname, flags.port)
    if flags.port == 0:
        config = dataclasses.replace(config, flags=dataclasses.replace(flags, port=free_port()))
    if config.num_shard > 1:
        sink.info(f"Sharding model on {config.num_shard} processes")
        if flags.master_port is None:
            # Not TGI's 29500: two launches that begin at the same moment would both find it free.
            config = dataclasses.replace(config, master_port=free_port())
    with socket_path(flags.shard_uds_path, config.num_shard) as uds_path:
        plan = make_plan(config, Launch(nonce=secrets.token_hex(16), uds_path=uds_path, environ=environ))
        supervisor = Supervisor(
            plan,
            sink,
            grace_s=flags.graceful_termination_timeout,
            max_shard_restarts=flags.max_shard_restarts,
            stall_timeout_s=flags.stall_timeout,
            new_master_port=free_port if config.num_shard > 1 and flags.master_port is None else None,
            on_ready=lambda seconds: _announce(config, seconds, sink),
        )
        return asyncio.run(supervisor.run())


def open_sink(flags: Flags, environ: Mapping[str, str]) -> LogSink:
    """Logs go to standard output, as TGI's do."""
    terminal = os.isatty(STDOUT) and environ.get("TERM") != "dumb" and not flags.json_output
    colour = wants_colour(environ, is_terminal=terminal)

    def render(record: Record) -> str:
        return render_json(record) if flags.json_output else render_text(record, colour=colour)

    def render_progress(text: str, span: Mapping[str, Any] | None) -> str:
        return render(Record(message=text, span=span))

    display: Display = (Bars if terminal else StepLines)(_write_line, render_progress)
    return LogSink(display, render, level=own_level(environ.get("LOG_LEVEL", "info")))


def wants_colour(environ: Mapping[str, str], *, is_terminal: bool) -> bool:
    """LOG_COLORIZE decides where it is given, then NO_COLOR, then whether a person is looking."""
    asked = environ.get("LOG_COLORIZE", "").lower()
    if asked:
        return asked in ("1", "true", "yes")
    return is_terminal and not environ.get("NO_COLOR")


def _write_line(text: str) -> None:
    # The descriptor itself: a buffered stream would keep what its reader does not take, and its lock.
    data = memoryview(text.encode("utf-8", "backslashreplace") + b"\n")
    while data:
        data = data[os.write(STDOUT, data) :]


def _announce(config: LauncherConfig, seconds: Seconds, sink: LogSink) -> None:
    if config.flags.json_output:
        rounded = {step: round(spent, 3) for step, spent in seconds.items()}
        sink.info(f"Ready at {url(config)}", url=url(config), seconds=rounded)
        return
    sink.info(f"Ready in {seconds['total']:.2f}s ({step_times(seconds)})")
    sink.text(ready_text(config))


def _report(error: LauncherError, sink: LogSink, *, json_output: bool) -> None:
    """The one clear line; arguments are refused in TGI's words on standard error."""
    if json_output:
        sink.error(str(error), error=error.name)
    elif isinstance(error, ArgumentValidation | NotEnoughCUDADevices):
        sys.stderr.write(f"Error: {error.name}({json.dumps(str(error), ensure_ascii=False)})\n")
    else:
        sink.error(str(error), error=error.name)
