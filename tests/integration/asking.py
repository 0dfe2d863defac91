"""Requests to a running server, and what its metrics say."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from integration.launched import Launched
from text_generation_launcher.benchmark.sse import SseReader

WITHIN_S = 120.0
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time to linger: closing sends a reset instead of the orderly end."""


def body(inputs: str, **parameters: Any) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": {"details": True, **parameters}}


def generate(server: Launched, inputs: str, **parameters: Any) -> dict[str, Any]:
    """The answer of ``/generate`` with its details."""
    response = server.client.post("/generate", json=body(inputs, **parameters))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def token_ids(answer: dict[str, Any]) -> list[int]:
    return [token["id"] for token in answer["details"]["tokens"]]


def stream(server: Launched, inputs: str, **parameters: Any) -> list[dict[str, Any]]:
    """All events of ``/generate_stream``."""

    async def read() -> list[dict[str, Any]]:
        async with asyncio.timeout(WITHIN_S):
            async with connect(server, "/generate_stream", body(inputs, **parameters)) as connection:
                return [event async for event in connection.events()]

    return asyncio.run(read())


class Connection:
    """One request on a connection of its own, which can be left in any way."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._response = SseReader()

    @property
    def status(self) -> int | None:
        return self._response.status

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream, up to its end."""
        while not self._response.ended:
            data = await self._reader.read(65536)
            assert data, f"the stream broke off: {bytes(self._response.body)!r}"
            for event in self._response.feed(data):
                yield json.loads(event)

    async def answer(self) -> Any:
        """The JSON body of a response that is no stream."""
        async for _ in self.events():
            raise AssertionError("a stream")
        return self.body()

    def body(self) -> Any:
        """The JSON body of a response that has ended, and was no stream."""
        return json.loads(self._response.body)

    async def some(self, size: int = 65536) -> bytes:
        """Something of the response, as soon as it is there. Raises: AssertionError at its end."""
        data = await self._reader.read(size)
        assert data
        return data

    async def leave(self) -> None:
        """End it as a client that is done does: FIN, and then whatever the server still has to say."""
        self._writer.write_eof()
        while await self._reader.read(65536):
            pass

    def reset(self) -> None:
        """End it as a client that crashes does: RST."""
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._writer.transport.abort()


def address_of(server: Launched | str) -> tuple[str, int]:
    address = urlsplit(server if isinstance(server, str) else server.url)
    assert address.hostname and address.port
    return address.hostname, address.port


def message(path: str, request: dict[str, Any], *, headers: str = "") -> bytes:
    """A request as it goes over the wire. ``headers``: more of them, each with its end of line."""
    return raw_message(path, json.dumps(request).encode(), headers=headers)


def raw_message(path: str, content: bytes, *, headers: str = "") -> bytes:
    """The same with a body that need not be JSON."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: test\r\n{headers}content-type: application/json\r\n"
        f"content-length: {len(content)}"
    )
    return f"{head}\r\n\r\n".encode() + content


@asynccontextmanager
async def connect(server: Launched | str, path: str, request: dict[str, Any]) -> AsyncIterator[Connection]:
    """Send a request on a new connection to a server, or to the URL of one."""
    reader, writer = await asyncio.open_connection(*address_of(server))
    try:
        writer.write(message(path, request))
        yield Connection(reader, writer)
    finally:
        writer.transport.abort()


async def answer_of(server: Launched, path: str, request: dict[str, Any]) -> Any:
    """The JSON body that answers a request."""
    async with asyncio.timeout(WITHIN_S), connect(server, path, request) as connection:
        return await connection.answer()


def metrics(server: Launched) -> dict[str, float]:
    """Every sample of ``/metrics`` by its name and labels."""
    response = server.client.get("/metrics")
    assert response.status_code == 200
    samples = (line.rpartition(" ") for line in response.text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def num_in_progress(values: dict[str, float]) -> float:
    """Requests that have begun and not ended, by the counters."""
    failures = sum(value for name, value in values.items() if name.startswith("tgi_request_failure{"))
    return values["tgi_request_count"] - values["tgi_request_success"] - failures - values["tgi_request_cancelled"]


def wait_until(server: Launched, condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """The metrics as soon as they fulfil ``condition``."""
    deadline = time.monotonic() + WITHIN_S
    while not condition(values := metrics(server)):
        assert time.monotonic() < deadline, {name: value for name, value in values.items() if "bucket" not in name}
        time.sleep(0.05)
    return values


def wait_for_status(server: Launched, path: str, status: int) -> None:
    deadline = time.monotonic() + WITHIN_S
    while server.client.get(path).status_code != status:
        assert time.monotonic() < deadline, f"{path} does not become {status}"
        time.sleep(0.02)


def wait_until_idle(server: Launched) -> dict[str, float]:
    """The metrics once nothing waits or runs: everything that requests held is free then."""
    values = wait_until(server, lambda now: num_in_progress(now) == 0 and now["tgi_batch_current_size"] == 0)
    assert values["tgi_queue_size"] == 0
    assert values["tgi_kv_cache_usage"] == 0
    assert values["tgi_batch_current_max_tokens"] == 0
    return values
