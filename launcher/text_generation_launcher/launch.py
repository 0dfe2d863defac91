"""One launch, from checked flags to the exit code: the only place that joins the parts."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from text_generation_launcher.config import LauncherConfig, resolve
from text_generation_launcher.devices import find_devices
from text_generation_launcher.errors import ArgumentValidation, LauncherError, NotEnoughCUDADevices
from text_generation_launcher.flags import Flags
from text_generation_launcher.logs import Display, LogSink, Record, own_level, render_json, render_text
from text_generation_launcher.plan import Launch, make_plan
from text_generation_launcher.process import Seconds
from text_generation_launcher.progress import Bars, StepLines
from text_generation_launcher.report import (
    given_arguments,
    is_terminal,
    ready_text,
    runtime_report,
    step_times,
    url,
    wants_colour,
)
from text_generation_launcher.sockets import check_port, free_master_port, socket_path
from text_generation_launcher.supervisor import Supervisor

STDOUT = 1


def launch(flags: Flags, environ: Mapping[str, str], warnings: Sequence[str]) -> int:
    """Run the server until it is told to stop; returns the exit code."""
    log = open_log(flags, environ)
    try:
        code = _launch(flags, environ, warnings, log)
    except LauncherError as error:
        code = error.exit_code
        _report(error, log, json_output=flags.json_output)
    if not log.close():
        # Nobody takes our last lines: the interpreter's own flush at exit would wait for ever.
        os._exit(code)
    return code


def _launch(flags: Flags, environ: Mapping[str, str], warnings: Sequence[str], log: LogSink) -> int:
    if flags.env:
        log.info(runtime_report(environ))
    log.info(f"Args: {given_arguments(flags)}")
    config = resolve(flags, find_devices(environ))
    for warning in (*warnings, *config.warnings):
        log.warning(warning)
    if flags.disable_custom_kernels:
        log.info("`--disable-custom-kernels`: PyTorch's own operators only (attention torch)")
    check_port(config.hostname, flags.port)
    if config.num_shard > 1:
        log.info(f"Sharding model on {config.num_shard} processes")
        if flags.master_port is None:
            config = dataclasses.replace(config, master_port=free_master_port(config.master_port))
    with socket_path(flags.shard_uds_path, config.num_shard) as uds_path:
        plan = make_plan(config, Launch(nonce=secrets.token_hex(16), uds_path=uds_path, environ=environ))
        supervisor = Supervisor(
            plan,
            log,
            grace_s=flags.graceful_termination_timeout,
            on_ready=lambda seconds: _announce(config, seconds, log),
        )
        return asyncio.run(supervisor.run())


def open_log(flags: Flags, environ: Mapping[str, str]) -> LogSink:
    """Logs go to standard output, as TGI's do."""
    terminal = is_terminal(STDOUT, environ) and not flags.json_output
    colour = wants_colour(environ, is_terminal=terminal)

    def render(record: Record) -> str:
        return render_json(record) if flags.json_output else render_text(record, colour=colour)

    def render_progress(text: str, span: Mapping[str, Any] | None) -> str:
        return render(Record(message=text, span=span))

    display: Display = (Bars if terminal else StepLines)(_write_line, render_progress)
    return LogSink(display, render, level=own_level(environ.get("LOG_LEVEL", "info")))


def _write_line(text: str) -> None:
    # The descriptor itself: a buffered stream would keep what its reader does not take, and its lock.
    data = memoryview(text.encode("utf-8", "backslashreplace") + b"\n")
    while data:
        data = data[os.write(STDOUT, data) :]


def _announce(config: LauncherConfig, seconds: Seconds, log: LogSink) -> None:
    if config.flags.json_output:
        rounded = {step: round(spent, 3) for step, spent in seconds.items()}
        log.info(f"Ready at {url(config)}", url=url(config), seconds=rounded)
        return
    log.info(f"Ready in {seconds['total']:.2f}s ({step_times(seconds)})")
    log.text(ready_text(config, seconds))


def _report(error: LauncherError, log: LogSink, *, json_output: bool) -> None:
    """The one clear line; arguments are refused in TGI's words on standard error."""
    if json_output:
        log.error(str(error), error=error.name)
    elif isinstance(error, ArgumentValidation | NotEnoughCUDADevices):
        sys.stderr.write(f"Error: {error.name}({json.dumps(str(error), ensure_ascii=False)})\n")
    else:
        log.error(str(error), error=error.name)
