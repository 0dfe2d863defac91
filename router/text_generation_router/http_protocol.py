"""uvicorn's HTTP/1.1 protocol, with what a server in front of long and costly answers needs besides."""

from __future__ import annotations

import asyncio
import http
from typing import Any, Protocol, cast

import httptools
from starlette.responses import Response
from starlette.types import ASGIApp, Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES = 64 * 1024
"""Of a request line and its headers."""
MAX_HEADERS = 100
FIRST_BYTE_S = 10.0
"""For a new connection to begin a request."""
RECEIPT_S = 30.0
"""For a request to arrive whole, from its first byte on; the answer may take as long as it likes."""

WRITE_STALL_S = 60.0
"""A client that takes nothing off its connection for so long counts as gone."""

MAX_PIPELINED = 16
"""Requests of a connection that are read while one is answered; with more, reading pauses."""
MAX_DISCARDED_BYTES = 64 * 2**20
"""Of a body that was refused unread. To close at once would be a reset, and with it the client would lose the answer;
a client that still sends after so much is cut off."""


TOO_LARGE = "The request line and headers are too large"


class Turnstile(Protocol):
    def refusal(self, scope: Scope) -> Response | None:
        """The answer to a request of which there is no more than its head; None: it may pass."""


class HttpProtocol(HttpToolsProtocol):
    """Notices a client that goes away while requests are pipelined, can cut off one that does not read, takes requests
    that offer an upgrade as what they are, and reads the rest of a refused body.

    Requests have to arrive within limits of size and time, which uvicorn does not set: a client that sends a gigabyte
    of headers, or a byte a minute, is told so and cut off.

    ``scope["state"]["abort"]`` closes the connection at once, whatever is still to be sent.
    """

    max_connections: int | None = None
    """Of the whole server; a connection beyond them is told so and closed."""
    turnstile: Turnstile | None = None
    """Whom it refuses gets the answer at once, from no task, in the turn of the loop in which the request came."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unanswered: list[RequestResponseCycle] = []
        self._num_discarded = 0
        self._deadline: asyncio.TimerHandle | None = None
        """By when what is due has to be there: the beginning of a request, or all of it."""
        self._is_in_head = False
        self._is_in_body = False
        self._num_fed = 0
        """Bytes that the parser is given now."""
        self._num_extra_bytes = 0
        """What has come of the request that is no body: its head, and what may stand behind a body in chunks."""
        self._num_left = 0
        """Of the last answer, what the client had not taken at the last look."""
        self._taken_at = 0.0
        """When it was more."""
        self._is_refused = False
        """Whether the connection has got its last answer; what still comes is thrown away."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        if self.max_connections is not None and len(self.connections) > self.max_connections:
            self._refuse(503, "Too many connections")
            return
        self._deadline = self.loop.call_later(FIRST_BYTE_S, self._on_silence)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._num_fed = len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stopped:
            self._decline_upgrade(data[stopped.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        else:
            self._num_extra_bytes += len(data)
            too_long = self._num_extra_bytes > MAX_HEAD_BYTES
            if self._deadline is not None and (too_long or (self._is_in_head and self._head_is_too_large())):
                self._refuse(431, TOO_LARGE)

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        # uvicorn leaves it running when a connection is reset, and with it all that it knew of the connection.
        self._unset_keepalive_if_required()
        self._give_up_answers()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def on_message_begin(self) -> None:
        if self._is_refused:
            return
        # Not with the first byte on the connection: empty lines between requests keep nothing alive.
        self._unset_keepalive_if_required()
        self._clear_deadline()
        self._deadline = self.loop.call_later(RECEIPT_S, self._on_slow_request)
        self._is_in_head, self._is_in_body = True, False
        self._num_extra_bytes = -self._num_fed  # what this packet brings is judged by its headers
        super().on_message_begin()
        self.scope["state"]["abort"] = self._abort
        self._num_discarded = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # what stands behind a body in chunks is nobody's header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        if self._is_refused:
            return
        if self._head_is_too_large():
            self._refuse(431, TOO_LARGE)
            return
        num_hosts = sum(name == b"host" for name, _ in self.headers)
        if num_hosts != 1 and (num_hosts or self.parser.get_http_version() == "1.1"):
            self._refuse(400, "A request has one Host header")
            return
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        self._is_in_body = True
        # Events of a stream need not pass all that has wrapped it on the way to the handler.
        self.scope["state"]["send"] = self.cycle.send
        self._unanswered = [cycle for cycle in self._unanswered if not cycle.response_complete]
        self._unanswered.append(self.cycle)
        if 1 < len(self._unanswered) <= MAX_PIPELINED:
            self.flow.resume_reading()  # a connection that is not read does not tell that its client has gone

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        answer = None if self.turnstile is None else self.turnstile.refusal(cast("Scope", cycle.scope))
        if answer is None:
            super()._start_asgi_task(cycle, app)  # type: ignore[arg-type]
            return
        head = [b"HTTP/1.1 %d %s" % (answer.status_code, http.HTTPStatus(answer.status_code).phrase.encode())]
        head += [b"%s: %s" % header for header in (*cycle.default_headers, *answer.raw_headers)]
        if not cycle.keep_alive:
            head.append(b"connection: close")
        self.transport.write(b"\r\n".join((*head, b"", bytes(answer.body))))
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def on_body(self, body: bytes) -> None:
        if self._is_refused:
            return
        self._num_extra_bytes = -self._num_fed
        if self.cycle.response_complete:
            self._num_discarded += len(body)
            if self._num_discarded > MAX_DISCARDED_BYTES:
                self._abort()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_body = False
        self._clear_deadline()
        if self._is_refused or self.parser.should_upgrade():
            return
        super().on_message_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            # It was answered before its body was there; from now on the connection is idle.
            self._unset_keepalive_if_required()
            self._await_next_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._num_left = 0
        if self._deadline is not None:  # the next request is on its way; its time begins when it is its turn
            self._unset_keepalive_if_required()
            self._clear_deadline()
            self._deadline = self.loop.call_later(RECEIPT_S, self._on_slow_request)

    def timeout_keep_alive_handler(self) -> None:
        num_left, now = self.transport.get_write_buffer_size(), self.loop.time()
        if not num_left:
            super().timeout_keep_alive_handler()
            return
        if self._num_left != num_left:  # it takes its time, and takes something
            self._num_left, self._taken_at = num_left, now
        if now - self._taken_at > WRITE_STALL_S - self.timeout_keep_alive:
            self._abort()  # to close would wait for a client that does not read
        else:
            self._await_next_request()

    def _await_next_request(self) -> None:
        """As uvicorn does behind an answer."""
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _decline_upgrade(self, rest: bytes) -> None:
        """Parse a request again as if it offered no upgrade (to HTTP/2, say). ``rest`` follows its headers.

        The parser takes everything behind such headers for another protocol, the body too.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("CONNECT is not supported.")
            return
        lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.data_received(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _head_is_too_large(self) -> bool:
        if len(self.headers) > MAX_HEADERS:
            return True
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES

    def _on_silence(self) -> None:
        self._deadline = None
        self.transport.abort()

    def _on_slow_request(self) -> None:
        self._deadline = None
        unfinished = sum(not cycle.response_complete for cycle in self._unanswered)
        if self.flow.read_paused or unfinished > (0 if self._is_in_head else 1):  # it is we who make it wait
            self._deadline = self.loop.call_later(RECEIPT_S, self._on_slow_request)
            return
        self._refuse(408, f"The request did not arrive within {RECEIPT_S:g} s")

    def _refuse(self, status: int, text: str) -> None:
        """Say why, and close. Where an answer has begun there is no room for a word between."""
        if self._is_refused:
            return
        self._is_refused = True
        self._clear_deadline()
        others = [cycle for cycle in self._unanswered if not cycle.response_complete]
        # The last one may be the request that is refused while its body comes.
        answered = self._is_in_body and self.cycle.response_complete  # another answer would be the next request's
        if answered or len(others) > 1 or any(cycle.response_started or not cycle.more_body for cycle in others):
            self._abort()
            return
        head = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: text/plain; charset=utf-8\r\n"
        self.transport.write(f"{head}content-length: {len(text)}\r\nconnection: close\r\n\r\n{text}".encode())
        self.transport.close()
        self._give_up_answers()
        # Closing waits for the client to take what is left for it.
        self._deadline = self.loop.call_later(FIRST_BYTE_S, self._on_silence)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _abort(self) -> None:
        self._give_up_answers()  # now: `connection_lost` comes a turn of the loop later
        self.transport.abort()

    def _give_up_answers(self) -> None:
        for cycle in self._unanswered:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
