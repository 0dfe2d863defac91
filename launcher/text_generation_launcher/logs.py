"""What the launcher prints: its own lines and its children's, for people or as TGI's JSON lines.

Everything goes through one bounded queue to one writer thread. So a terminal or pipe that takes nothing
blocks that thread alone: children are always drained, and lines that find no room are counted.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from text_generation_proto.logs import LEVELS

from text_generation_launcher.progress import Progress, Span

TARGET = "text_generation_launcher"

_LEVEL_NAMES = {"WARNING": "WARN", "CRITICAL": "ERROR", "FATAL": "ERROR", "SUCCESS": "INFO"}
_NUMBERS = {"TRACE": 5, "DEBUG": 10, "INFO": 20, "WARN": 30, "ERROR": 40}
_COLOURS = {"TRACE": "35", "DEBUG": "34", "INFO": "32", "WARN": "33", "ERROR": "31"}

# Prompts reach log lines: a control character of theirs must not reach the terminal.
_CONTROL = {code: f"\\x{code:02x}" for code in [*range(0x20), *range(0x7F, 0xA0)] if chr(code) not in "\t\n"}


def now() -> str:
    """RFC 3339, UTC, as TGI writes it."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One log line."""

    message: str
    level: str = "INFO"
    target: str = TARGET
    timestamp: str = field(default_factory=now)
    span: Span = None
    """``{"name": "shard-manager", "rank": 0}``, or a request's span of the router; the launcher's lines have none."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    flat: bool = False
    """The router's JSON lines carry their fields at the top, as TGI's router does."""


def parse_line(line: bytes, *, span: Span, flat: bool) -> tuple[Record, bool]:
    """A child's line as a record, and whether it was one of JSON; any other text becomes an INFO record."""
    text = line.decode("utf-8", "replace").rstrip("\r\n")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or "message" not in content:
        return Record(message=text, span=span, flat=flat), False
    level = str(content.pop("level", "INFO")).upper()
    own_span = content.get("span")
    if span is None and isinstance(own_span, dict) and "name" in own_span:
        span = own_span
        content.pop("span")
    return Record(
        message=str(content.pop("message")),
        level=_LEVEL_NAMES.get(level, level),
        target=str(content.pop("target", "")),
        timestamp=str(content.pop("timestamp", None) or now()).replace("+00:00", "Z"),
        span=span,
        fields=content,
        flat=flat,
    ), True


def render_json(record: Record) -> str:
    line: dict[str, Any] = {"timestamp": record.timestamp, "level": record.level}
    if record.flat:
        line |= {"message": record.message, **record.fields, "target": record.target}
    else:
        line |= {"fields": {"message": record.message, **record.fields}, "target": record.target}
    if record.span is not None:
        line = {**line, "span": record.span, "spans": line.get("spans", [record.span])}
    return json.dumps(line, ensure_ascii=False, default=str)


def render_text(record: Record, *, colour: bool = False) -> str:
    own = record.target == TARGET
    # A second line of a child's message is indented, so that it cannot pass for a log line of its own.
    message = record.message.translate(_CONTROL).replace("\n", "\n" if own else "\n    ")
    fields = {name: value for name, value in record.fields.items() if name != "spans"}
    exception = str(fields.pop("exception", "") or "")
    pairs = "".join(f" {key}={_value(value)}" for key, value in fields.items())
    if exception:
        pairs += "\n    " + exception.translate(_CONTROL).replace("\n", "\n    ")
    span = f"{_span(record.span)}: " if record.span is not None else ""
    target = f"{record.target}: " if record.target else ""
    level = f"{record.level:>5}"
    if not colour:
        return f"{record.timestamp} {level} {span}{target}{message}{pairs}"
    level = f"\x1b[{_COLOURS.get(record.level, '0')}m{level}\x1b[0m"
    return f"\x1b[2m{record.timestamp}\x1b[0m {level} \x1b[1m{span}\x1b[0m\x1b[2m{target}\x1b[0m{message}{pairs}"


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.translate(_CONTROL).replace("\n", "\\n")


def _span(span: Mapping[str, Any]) -> str:
    inside = " ".join(f"{key}={_value(value)}" for key, value in span.items() if key != "name")
    return _value(span["name"]) + (f"{{{inside}}}" if inside else "")


def own_level(log_level: str) -> int:
    """Lowest level of the launcher's own lines, from a ``LOG_LEVEL`` such as ``info,text_generation_router=debug``."""
    level = logging.INFO
    for entry in log_level.lower().split(","):
        target, _, name = entry.strip().rpartition("=")
        if target in ("", TARGET) and name in LEVELS:
            level = LEVELS[name] if name != "off" else logging.CRITICAL
    return level


class Display(Protocol):
    """Where lines and progress end up; used by the writer thread alone."""

    def line(self, text: str) -> None: ...
    def progress(self, progress: Progress, span: Span) -> None: ...
    def end_progress(self, span: Span) -> None: ...
    def close(self) -> None: ...


class LogSink:
    """The queue and its thread."""

    def __init__(
        self, display: Display, render: Callable[[Record], str], *, level: int = logging.INFO, capacity: int = 10_000
    ) -> None:
        self._display = display
        self._render = render
        self._level = level
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(capacity)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="log-writer", daemon=True)
        self._thread.start()

    def log(self, level: str, message: str, span: Span = None, **fields: Any) -> None:
        """One of the launcher's own lines."""
        if _NUMBERS[level] >= self._level:
            self.emit(Record(level=level, message=message, span=span, fields=fields))

    def info(self, message: str, span: Span = None, **fields: Any) -> None:
        self.log("INFO", message, span, **fields)

    def warning(self, message: str, span: Span = None, **fields: Any) -> None:
        self.log("WARN", message, span, **fields)

    def error(self, message: str, span: Span = None, **fields: Any) -> None:
        self.log("ERROR", message, span, **fields)

    def emit(self, record: Record) -> None:
        self._put(lambda: self._display.line(self._render(record)))

    def text(self, text: str) -> None:
        """Plain text for people."""
        self._put(lambda: self._display.line(text))

    def progress(self, progress: Progress, span: Span) -> None:
        self._put(lambda: self._display.progress(progress, span))

    def end_progress(self, span: Span) -> None:
        """Nothing more is under way in ``span``: no bar may stay."""
        self._put(lambda: self._display.end_progress(span))

    def close(self, timeout: float = 2.0) -> bool:
        """Write what is left; False when the stream took it not in time."""
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            return False
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _put(self, action: Callable[[], None]) -> None:
        try:
            self._queue.put_nowait(action)
        except queue.Full:
            self._dropped += 1

    def _write(self) -> None:
        while (action := self._queue.get()) is not None:
            try:
                action()
                if self._dropped:
                    dropped, self._dropped = self._dropped, 0
                    lost = Record(level="WARN", message=f"{dropped} log lines were dropped: the log was not read")
                    self._display.line(self._render(lost))
            except OSError:
                continue  # nobody reads any more; serving goes on
        self._display.close()
