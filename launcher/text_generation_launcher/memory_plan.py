"""`--plan`: the server's own memory plan, printed instead of a launch.

A child prints it, because it is made by the code that a shard sizes its cache with, and that needs torch. Standard
output has the plan and nothing else, so that programs can read it; what went wrong is one line on standard error.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping

from text_generation_launcher.config import resolve
from text_generation_launcher.devices import find_devices
from text_generation_launcher.errors import LauncherError
from text_generation_launcher.flags import Flags
from text_generation_launcher.logs import Record, parse_line
from text_generation_launcher.plan import ProcessSpec, plan_spec

INTERRUPTED = 130
"""What shells make of Ctrl-C."""


def print_plan(flags: Flags, environ: Mapping[str, str]) -> int:
    """The exit code: 0 if it fits, 1 if not or if there is no telling, 128 + n after a signal n."""
    try:
        spec = plan_spec(resolve(flags, find_devices(environ)), environ)
    except LauncherError as error:
        sys.stderr.write(f"Error: {error.name}({json.dumps(str(error), ensure_ascii=False)})\n")
        return error.exit_code
    try:
        return _run(spec)
    except KeyboardInterrupt:  # of the terminal, which has told the child too
        return INTERRUPTED


def _run(spec: ProcessSpec) -> int:
    child = subprocess.Popen(spec.argv, env=dict(spec.env), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with child:
        assert child.stderr is not None
        for line in child.stderr:
            record, structured = parse_line(line, span=None, flat=False)
            if text := _told(record) if structured else record.message:
                sys.stderr.write(f"{text}\n")
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _told(record: Record) -> str:
    """Of the child's log, what a person needs beside the plan."""
    word = {"ERROR": "Error", "WARN": "Warning"}.get(record.level)
    return f"{word}: {record.message}" if word else ""
