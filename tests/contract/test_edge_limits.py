"""Limits on what clients send, and requests of which two servers would think differently; on raw sockets."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import scripted
from text_generation_router import http_protocol, listening
from text_generation_router.http_protocol import HttpProtocol
from text_generation_router.scheduling.requests import QueuedRequest

BODY = json.dumps({"inputs": "hi"}).encode()
JSON = b"content-type: application/json\r\n"
HEAD = b"POST /generate HTTP/1.1\r\nhost: x\r\n" + JSON
WHOLE = HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
LIVE = b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n"


@asynccontextmanager
async def talking(
    script: scripted.Script = scripted.hello,
) -> AsyncIterator[tuple[scripted.Router, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A router, and a connection to it."""
    async with (
        scripted.running(script=script, over_socket=True) as router,
        asyncio.timeout(20),
        connected(router) as (reader, writer),
    ):
        yield router, reader, writer


@asynccontextmanager
async def connected(router: scripted.Router) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(router.client.base_url.host, router.client.base_url.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def status_and_end(reader: asyncio.StreamReader) -> tuple[int | None, bytes]:
    """Of the first answer, and all that follows it up to the end of the connection."""
    received = bytearray()
    try:
        while data := await reader.read(65536):
            received += data
    except ConnectionError:
        pass
    return (int(received.split()[1]) if received.startswith(b"HTTP/1.1 ") else None), bytes(received)


async def answer_to(router: scripted.Router, *parts: bytes) -> tuple[int | None, bytes]:
    async with connected(router) as (reader, writer):
        ending = asyncio.create_task(status_and_end(reader))
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
        except ConnectionError:
            pass
        return await ending


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short limits of time."""
    monkeypatch.setattr(http_protocol, "FIRST_BYTE_S", 0.2)
    monkeypatch.setattr(http_protocol, "RECEIPT_S", 0.3)
    monkeypatch.setattr(listening, "KEEP_ALIVE_S", 0.2)


def endless_header() -> Iterator[bytes]:
    yield HEAD + b"x-long: "
    for _ in range(64):
        yield b"a" * 65536


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(list(endless_header()), id="one header of megabytes"),
        pytest.param([HEAD + b"".join(b"x-%d: y\r\n" % i for i in range(200)) + b"\r\n"], id="200 headers"),
        pytest.param([HEAD + b"".join(b"x-%d: y\r\n" % i for i in range(100_000))], id="100,000 headers, and no end"),
        pytest.param([HEAD + b"x: %s\r\n\r\n" % (b"a" * 65536)], id="a header of 64 KiB at once"),
        pytest.param([b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n"], id="a path of 70 kB"),
        pytest.param(
            [HEAD + b"".join(b"x-%d: %s\r\n" % (i, b"a" * 900) for i in range(80)) + b"\r\n"], id="72 kB in all"
        ),
    ],
)
async def test_a_head_that_is_too_large_is_refused(parts: list[bytes]) -> None:
    async with scripted.running(over_socket=True) as router, asyncio.timeout(20):
        status, _ = await answer_to(router, *parts)
        assert status == 431
        assert (await router.client.get("/live")).status_code == 200
        assert not router.batcher.seen


@pytest.mark.parametrize(
    ("headers", "size"),
    [(90, 100), (1, 60_000)],
)
async def test_a_head_within_the_limits_is_taken(headers: int, size: int) -> None:
    more = b"".join(b"x-%d: %s\r\n" % (i, b"a" * size) for i in range(headers))
    async with talking() as (_, reader, writer):
        writer.write(HEAD + more + b"content-length: %d\r\n\r\n" % len(BODY) + BODY)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(
            HEAD + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + LIVE, id="length and chunks"
        ),
        pytest.param(HEAD + b"content-length: 16\r\ncontent-length: 3\r\n\r\n" + BODY, id="two lengths"),
        pytest.param(HEAD + b"content-length: 16, 3\r\n\r\n" + BODY, id="two lengths in one"),
        pytest.param(HEAD + b"content-length: -1\r\n\r\n", id="a negative length"),
        pytest.param(HEAD + b"content-length: 0x10\r\n\r\n" + BODY, id="a length that is no decimal number"),
        pytest.param(HEAD + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n", id="chunks that are not last"),
        pytest.param(HEAD + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n", id="an unknown encoding"),
        pytest.param(b"GET /live HTTP/1.1\r\n\r\n", id="no host"),
        pytest.param(b"GET /live HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", id="two hosts"),
        pytest.param(b"GET /live HTTP/1.1\r\nhost: x\r\nx y: z\r\n\r\n", id="a space in a name"),
        pytest.param(b"GET /live HTTP/1.1\r\nhost: x\r\nx: a\x00b\r\n\r\n", id="a zero byte"),
        pytest.param(b"GET /live HTTP/9.9\r\nhost: x\r\n\r\n", id="no such version"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="a TLS hello"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2"),
    ],
)
async def test_what_is_no_clear_request_is_refused_and_the_connection_closed(request_: bytes) -> None:
    async with scripted.running(over_socket=True) as router, asyncio.timeout(20):
        status, received = await answer_to(router, request_)
        assert status == 400, received
        assert received.count(b"HTTP/1.1 ") == 1, "what is behind it is no request"
        assert not router.batcher.seen


async def test_http_1_0_needs_no_host() -> None:
    async with scripted.running(over_socket=True) as router, asyncio.timeout(20):
        status, _ = await answer_to(router, b"GET /live HTTP/1.0\r\n\r\n")
        assert status == 200


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("beginning", "drip", "status"),
    [
        pytest.param(b"", b"", None, id="a connection on which nothing comes"),
        pytest.param(b"\r\n", b"\r\n", None, id="empty lines"),
        pytest.param(b"POST /gen", b"e", 408, id="a slow request line"),
        pytest.param(HEAD, b"x: y\r\n", 408, id="slow headers"),
        pytest.param(HEAD + b"content-length: 9999\r\n\r\n", b" ", 408, id="a slow body"),
        pytest.param(HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n", 408, id="slow chunks"),
        pytest.param(HEAD + b"content-length: 9999\r\n\r\n", b"", 408, id="a body that stops"),
    ],
)
async def test_a_request_that_does_not_come_is_not_waited_for(
    beginning: bytes, drip: bytes, status: int | None
) -> None:
    async with talking() as (router, reader, writer):
        ending = asyncio.create_task(status_and_end(reader))
        writer.write(beginning)
        while not ending.done():
            writer.write(drip)
            await asyncio.sleep(0.02)
        got, received = await ending
        assert got == status, received
        await router.idle()


@pytest.mark.usefixtures("hasty")
async def test_empty_lines_do_not_keep_an_idle_connection() -> None:
    async with talking() as (_, reader, writer):
        writer.write(LIVE)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        ending = asyncio.create_task(status_and_end(reader))
        while not ending.done():
            writer.write(b"\r\n")
            await asyncio.sleep(0.02)


@pytest.mark.usefixtures("hasty")
async def test_an_answer_may_take_longer_than_a_request() -> None:
    asked: asyncio.Queue[QueuedRequest] = asyncio.Queue()
    async with talking(asked.put_nowait) as (_, reader, writer):
        # The second request waits meanwhile, and its beginning is there.
        writer.write(WHOLE + WHOLE[:50])
        queued = await asked.get()
        await asyncio.sleep(0.8)
        scripted.say(queued, "late")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")


async def test_a_body_in_a_million_chunks() -> None:
    async with scripted.running(over_socket=True, payload_limit=500_000) as router, asyncio.timeout(60):
        async with connected(router) as (reader, writer):
            writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n")
            answering = asyncio.create_task(reader.readline())
            for _ in range(100):
                writer.write(b"1\r\n \r\n" * 10_000)
                await writer.drain()
                if answering.done():
                    break
            assert (await answering).startswith(b"HTTP/1.1 413")
        assert (await router.client.get("/live")).status_code == 200


async def test_connections_beyond_the_limit_are_told_so() -> None:
    async with scripted.running(over_socket=True, max_connections=3) as router, asyncio.timeout(20):
        async with connected(router), connected(router), connected(router):
            await asyncio.sleep(0.1)
            status, _ = await answer_to(router)
            assert status == 503
        await asyncio.sleep(0.1)
        assert (await router.client.get("/live")).status_code == 200


async def test_connections_that_are_reset_leave_nothing_behind() -> None:
    async with scripted.running(over_socket=True) as router, asyncio.timeout(60):
        address = (router.client.base_url.host, router.client.base_url.port)
        for _ in range(300):
            sock = socket.socket()
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, address)
            await asyncio.get_running_loop().sock_sendall(sock, LIVE)
            await asyncio.get_running_loop().sock_recv(sock, 100)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            sock.close()
        await asyncio.sleep(0.2)
        gc.collect()
        assert sum(issubclass(type(each), HttpProtocol) for each in gc.get_objects()) <= 3
