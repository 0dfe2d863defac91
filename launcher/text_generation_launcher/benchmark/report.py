"""A benchmark as a command: check the flags, measure, then say everything once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import uvloop

from text_generation_launcher.benchmark import tables
from text_generation_launcher.benchmark.config import STANDARD_OUTPUT, BenchmarkConfig, Flags, resolve
from text_generation_launcher.benchmark.errors import BenchmarkError
from text_generation_launcher.benchmark.record import record
from text_generation_launcher.benchmark.session import End, Session, run
from text_generation_launcher.benchmark.views import make_view


def benchmark(flags: Flags) -> int:
    """The whole command; returns its exit code."""
    try:
        config = resolve(flags)
        session = uvloop.run(run(config, make_view))
        if session.error:  # behind the tables of what was measured before it
            _write(config, session)
            raise BenchmarkError(session.error)
        _write(config, session)
    except BenchmarkError as error:
        _say(f"Error: {error}")
        return End.FAILED.value
    except KeyboardInterrupt:  # a second one, that does not wait for an orderly end
        return End.INTERRUPTED.value
    if session.end is End.INTERRUPTED:
        _say("Stopped before the end.")
    return session.end.value


def _write(config: BenchmarkConfig, session: Session) -> None:
    """Tables or JSON to standard output, files where they were asked for. Raises: BenchmarkError for the latter."""
    progress = session.progress
    if progress is None or not progress.measured:
        return
    description, surprises, results = progress.description, session.surprises, progress.measured
    if config.json != STANDARD_OUTPUT:
        sys.stdout.write(tables.report(config, description, surprises, results))
        sys.stdout.flush()
    try:
        if config.json is not None:
            is_complete = session.end is End.COMPLETE
            content = record(config, description, surprises, results, is_complete=is_complete)
            text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
            if config.json == STANDARD_OUTPUT:
                sys.stdout.write(text)
                sys.stdout.flush()
            else:
                Path(config.json).write_text(text, encoding="utf-8")
        if config.plot is not None:
            from text_generation_launcher.benchmark.plot import plot

            plot(results, f"{description.model}, {description.kind}", config.plot)
    except OSError as error:
        raise BenchmarkError(f"cannot write {error.filename or 'the results'}: {error.strerror}") from None


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
