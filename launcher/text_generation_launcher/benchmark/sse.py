"""The least HTTP that reads a stream of server-sent events: pure, incremental, cheap.

A benchmark often shares its cores with the server that it measures, hence no HTTP library in its hot loop.
"""

from __future__ import annotations

from dataclasses import dataclass, field


class ProtocolError(Exception):
    """What arrived is not the HTTP that we read."""


@dataclass(slots=True)
class SseReader:
    """One HTTP/1.1 response, fed as it arrives; takes off chunked transfer coding and finds the `data:` lines."""

    status: int | None = None
    """None until the whole head is there."""
    ended: bool = False
    """The last chunk has been seen, or as many bytes as announced. Without either the connection's end is the end."""
    body: bytearray = field(default_factory=bytearray)
    """What is not yet a line of events; for any other answer the whole body."""
    _raw: bytearray = field(default_factory=bytearray)
    _is_stream: bool = True
    _chunked: bool = False
    _left: int | None = None

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads of the events that `data` completes, without `data:`."""
        self._raw += data
        if self.status is None and not self._read_head():
            return []
        if self._chunked:
            self._read_chunks()
        else:
            self._read_plain()
        return self._take_events() if self.status == 200 and self._is_stream else []

    def _read_head(self) -> bool:
        end = self._raw.find(b"\r\n\r\n")
        if end < 0:
            return False
        status_line, *lines = bytes(self._raw[:end]).split(b"\r\n")
        version, _, rest = status_line.partition(b" ")
        if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
            raise ProtocolError(f"not an HTTP/1 status line: {status_line[:80]!r}")
        self.status = int(rest[:3])
        for line in lines:
            name, _, value = line.partition(b":")
            match name.strip().lower():
                case b"transfer-encoding":
                    self._chunked = value.strip().lower() == b"chunked"
                case b"content-type":
                    self._is_stream = value.strip().lower().startswith(b"text/event-stream")
                case b"content-length":
                    self._left = int(value)
        del self._raw[: end + 4]
        return True

    def _read_chunks(self) -> None:
        raw, start = self._raw, 0
        while not self.ended:
            line_end = raw.find(b"\r\n", start)
            if line_end < 0:
                break
            size = int(raw[start:line_end].partition(b";")[0], 16)
            chunk_end = line_end + 2 + size
            if len(raw) < chunk_end + 2:
                break
            self.body += raw[line_end + 2 : chunk_end]
            start = chunk_end + 2
            self.ended = size == 0
        del raw[:start]

    def _read_plain(self) -> None:
        self.body += self._raw
        if self._left is not None:
            self._left -= len(self._raw)
            self.ended = self._left <= 0
        self._raw.clear()

    def _take_events(self) -> list[bytes]:
        # Every server puts the whole payload into one line, so its end is enough, whatever the blank lines look like.
        end = self.body.rfind(b"\n") + 1
        lines = bytes(self.body[:end]).split(b"\n")
        del self.body[:end]
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
