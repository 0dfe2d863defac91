"""The JSON log line that every process writes, and the events that children send to the launcher in it.

A child (router, shard, download) logs one JSON object a line to standard error. The launcher parses the
lines and prints them for people or, with ``--json-output``, for machines. A line with a key ``event`` is a
message to the launcher: progress of a long task, or readiness.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import queue
import threading
from datetime import UTC, datetime
from typing import Any, BinaryIO

_STANDARD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}

LEVELS = {"trace": logging.DEBUG, "debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING}
LEVELS |= {"warning": logging.WARNING, "error": logging.ERROR, "critical": logging.CRITICAL, "off": logging.CRITICAL}

STDERR = 2
FLUSH_S = 2.0
"""That the end of a process waits for its last lines to be written."""

UNKNOWN = 0
"""Of ``shards_lost``: an incarnation that the router has not heard of."""

EVENTS = "text_generation.events"
"""The logger of messages to the launcher; no ``LOG_LEVEL`` silences it, not even one that names it."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line: timestamp (RFC 3339, UTC), level, target, message, and the record's extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "target": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in record.__dict__.items() if key not in _STANDARD_FIELDS}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class BackgroundHandler(logging.Handler):
    """Writes on a thread of its own: nobody who logs, an event loop least of all, waits for a stream that nobody reads.

    Lines that find no room are counted, and the number is a line when there is some again.
    """

    def __init__(self, stream: BinaryIO | io.RawIOBase, *, capacity: int = 10_000) -> None:
        """``stream``: without a buffer, whose lock would hold up the end of the process. ``capacity``: in lines."""
        super().__init__()
        self._stream = stream
        self._capacity = capacity
        # Whatever is logged while it is changed, by a finalizer say, has to find its way in.
        self._queue: queue.SimpleQueue[str | threading.Event] = queue.SimpleQueue()
        self._num_dropped = 0
        threading.Thread(target=self._write_all, name="log-writer", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        if self._queue.qsize() >= self._capacity:
            self._num_dropped += 1
            return
        try:
            self._queue.put(self.format(record))
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Wait until all is written that was logged before, but not for ever."""
        written = threading.Event()
        self._queue.put(written)
        written.wait(FLUSH_S)

    def _write_all(self) -> None:
        while True:
            item = self._queue.get()
            if isinstance(item, threading.Event):
                item.set()
                continue
            if self._num_dropped:
                number, self._num_dropped = self._num_dropped, 0
                lost = logging.LogRecord(
                    __name__, logging.WARNING, "", 0, "%d log lines were dropped: the log was not read", (number,), None
                )
                item = f"{item}\n{self.format(lost)}"
            left = f"{item}\n".encode(errors="replace")
            with contextlib.suppress(Exception):  # nobody reads any more, say; serving goes on
                while left:
                    left = left[self._stream.write(left) :]


def configure_logging(level: str = "info", stream: BinaryIO | None = None) -> None:
    """Send all records of this process as JSON lines to ``stream`` (standard error).

    ``level`` is a TGI ``LOG_LEVEL``: a level name, or a filter such as ``info,text_generation_router=debug``.
    Entries that name neither a level nor ``target=level`` are ignored with a warning.
    """
    handler = BackgroundHandler(stream or io.FileIO(STDERR, "w", closefd=False))
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    unknown = []
    for entry in level.lower().split(","):
        target, _, name = entry.strip().rpartition("=")
        if name in LEVELS:
            logging.getLogger(target or None).setLevel(LEVELS[name])
        elif name:
            unknown.append(entry.strip())
    # Messages to the launcher are no matter of taste: without them it would wait for readiness for ever.
    logging.getLogger(EVENTS).setLevel(logging.INFO)
    if unknown:
        root.warning("LOG_LEVEL: ignored %s; known levels: %s", ", ".join(unknown), ", ".join(LEVELS))


def send_event(event: str, message: str, **fields: Any) -> None:
    """Log ``message`` at INFO as a message to the launcher.

    Events: ``progress`` (fields stage, done, total, unit, and file for a download), ``resolved`` (of a download, when
    the model is on this machine: fields folder, sha, pipeline_tag; the last two empty when unknown), ``ready``
    (field seconds: a dict of step -> duration), ``alive`` (of a shard that loads: it does not hang), and
    ``shards_lost`` (of a router; field incarnation, which may be `UNKNOWN`).
    """
    logging.getLogger(EVENTS).info(message, extra={"event": event, **fields})
