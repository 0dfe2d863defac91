"""uvicorn's HTTP/1.1 protocol, with what a server in front of long and costly answers needs besides."""

from __future__ import annotations

from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_PIPELINED = 16
"""Requests of a connection that are read while one is answered; with more, reading pauses."""
MAX_DISCARDED_BYTES = 64 * 2**20
"""Of a body that was refused unread. To close at once would be a reset, and with it the client would lose the answer;
a client that still sends after so much is cut off."""


class HttpProtocol(HttpToolsProtocol):
    """Notices a client that goes away while requests are pipelined, can cut off one that does not read, takes requests
    that offer an upgrade as what they are, and reads the rest of a refused body.

    ``scope["state"]["abort"]`` closes the connection at once, whatever is still to be sent.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unanswered: list[RequestResponseCycle] = []
        self._num_discarded = 0

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stopped:
            self._decline_upgrade(data[stopped.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def connection_lost(self, exc: Exception | None) -> None:
        self._give_up_answers()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["abort"] = self._abort
        self._num_discarded = 0

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        # Events of a stream need not pass all that has wrapped it on the way to the handler.
        self.scope["state"]["send"] = self.cycle.send
        self._unanswered = [cycle for cycle in self._unanswered if not cycle.response_complete]
        self._unanswered.append(self.cycle)
        if 1 < len(self._unanswered) <= MAX_PIPELINED:
            self.flow.resume_reading()  # a connection that is not read does not tell that its client has gone

    def on_body(self, body: bytes) -> None:
        if self.cycle.response_complete:
            self._num_discarded += len(body)
            if self._num_discarded > MAX_DISCARDED_BYTES:
                self._abort()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self._abort()  # to close would wait for a client that does not read
        else:
            super().timeout_keep_alive_handler()

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

    def _abort(self) -> None:
        self._give_up_answers()  # now: `connection_lost` comes a turn of the loop later
        self.transport.abort()

    def _give_up_answers(self) -> None:
        for cycle in self._unanswered:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
