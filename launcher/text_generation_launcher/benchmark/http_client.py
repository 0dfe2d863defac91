"""Requests over a connection of their own, with the time at which every event of the answer came."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

from text_generation_launcher.benchmark.sse import ProtocolError, SseReader

DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(slots=True)
class Exchange(asyncio.Protocol):
    """One request on one connection. Keeps events as they came; they are parsed when it is over."""

    request: bytes
    done: asyncio.Future[None]
    reader: SseReader = field(default_factory=SseReader)
    events: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None
    transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one without inheriting it
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        try:
            self.events += [(now, payload) for payload in self.reader.feed(data)]
        except (ProtocolError, ValueError) as error:
            self._finish(f"{type(error).__name__}: {error}")
        if self.reader.ended:
            self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(None if exc is None else f"{type(exc).__name__}: {exc}")

    def _finish(self, error: str | None) -> None:
        if not self.done.done():
            self.error = error
            self.done.set_result(None)


@dataclass(frozen=True, slots=True)
class Answer:
    """Of a request that is no stream."""

    status: int
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON; None if it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


async def exchange_events(
    url: str, path: str, body: dict[str, Any], limit_s: float, api_key: str | None = None
) -> tuple[Exchange, float, float]:
    """Post one request, wait until it is over; the exchange, its start and its end. Errors are in the exchange."""
    return await _exchange(url, http_request(url, path, body, api_key), limit_s)


async def ask(
    url: str, path: str, body: dict[str, Any] | None = None, *, limit_s: float, api_key: str | None = None
) -> Answer:
    """Get ``path``, or post ``body`` to it. Raises: OSError, when there is no answer in HTTP."""
    exchange, _, _ = await _exchange(url, http_request(url, path, body, api_key), limit_s)
    if exchange.error is not None or exchange.reader.status is None:
        raise OSError(exchange.error or "closed without an answer")
    return Answer(exchange.reader.status, bytes(exchange.reader.body))


async def _exchange(url: str, request: bytes, limit_s: float) -> tuple[Exchange, float, float]:
    address = urlsplit(url)
    tls = ssl.create_default_context() if address.scheme == "https" else None
    loop = asyncio.get_running_loop()
    exchange = Exchange(request, loop.create_future())
    start = time.perf_counter()
    try:
        async with asyncio.timeout(limit_s):
            port = address.port or DEFAULT_PORTS[address.scheme]
            await loop.create_connection(lambda: exchange, address.hostname or "", port, ssl=tls)
            await exchange.done
    except TimeoutError:
        exchange.error = f"TimeoutError: not over within {limit_s:g} s"
    except OSError as error:
        exchange.error = f"{type(error).__name__}: {error}"
    finally:
        if exchange.transport is not None:
            exchange.transport.abort()
    return exchange, start, time.perf_counter()


def http_request(url: str, path: str, body: dict[str, Any] | None, api_key: str | None = None) -> bytes:
    """The bytes of a GET, or with a ``body`` of a POST."""
    address = urlsplit(url)
    lines = [f"{'GET' if body is None else 'POST'} {address.path}{path} HTTP/1.1"]
    lines += [f"host: {address.netloc.rpartition('@')[2]}", "connection: close"]
    if api_key is not None:
        lines.append(f"authorization: Bearer {api_key}")
    content = b""
    if body is not None:
        content = json.dumps(body).encode()
        lines += ["content-type: application/json", f"content-length: {len(content)}"]
    return "\r\n".join([*lines, "", ""]).encode() + content
