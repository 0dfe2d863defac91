"""What single connections do, on real sockets: upgrades, large bodies, pipelining, clients that go or stop reading."""

from __future__ import annotations

import asyncio
import http.client
import json

import pytest
import scripted
from text_generation_router import http_protocol
from text_generation_router.scheduling.requests import QueuedRequest

BODY = json.dumps({"inputs": "hi"}).encode()
JSON = b"content-type: application/json\r\n"
UPGRADE = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"


def post(path: bytes, headers: bytes = b"") -> bytes:
    return b"POST %s HTTP/1.1\r\nhost: x\r\n%s%scontent-length: %d\r\n\r\n" % (path, JSON, headers, len(BODY))


async def connect(router: scripted.Router) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(router.client.base_url.host, router.client.base_url.port)


async def read_response(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of a response with a length."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


@pytest.mark.parametrize("in_one_piece", [True, False])
async def test_an_offered_upgrade_is_declined_and_the_request_answered(in_one_piece: bool) -> None:
    async with scripted.running(over_socket=True) as router, asyncio.timeout(10):
        reader, writer = await connect(router)
        for headers in (UPGRADE, UPGRADE, b""):
            request = post(b"/generate", headers) + BODY
            parts = [request] if in_one_piece else [request[:20], request[20 : -len(BODY)], BODY[:3], BODY[3:]]
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0.02)
            status, body = await read_response(reader)
            assert status == 200, body
            assert "generated_text" in json.loads(body)
        writer.close()


async def test_connect_is_refused() -> None:
    async with scripted.running(over_socket=True) as router, asyncio.timeout(10):
        reader, writer = await connect(router)
        writer.write(b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org:443\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 400")
        writer.close()


@pytest.mark.parametrize("megabytes", [3, 20])
@pytest.mark.parametrize(("content_type", "status"), [("application/json", 413), ("text/plain", 415)])
async def test_a_large_body_that_is_refused_gets_its_answer(megabytes: int, content_type: str, status: int) -> None:
    async with scripted.running(over_socket=True) as router:
        url = router.client.base_url

        def ask() -> list[int]:
            connection = http.client.HTTPConnection(url.host, url.port or 80, timeout=20)
            statuses = []
            for body in (b"x" * (megabytes * 1_000_000), b"x"):
                connection.request("POST", "/generate", body, {"content-type": content_type})
                response = connection.getresponse()
                response.read()
                statuses.append(response.status)
            connection.close()
            return statuses

        # The connection is fit for another request.
        assert await asyncio.to_thread(ask) == [status, 400 if status == 413 else 415]


async def test_an_endless_body_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "MAX_DISCARDED_BYTES", 5_000_000)
    async with scripted.running(over_socket=True) as router, asyncio.timeout(20):
        _reader, writer = await connect(router)
        writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\n" + JSON + b"content-length: 99999999999\r\n\r\n")
        with pytest.raises(ConnectionError):
            while True:
                writer.write(b"x" * 100_000)
                await writer.drain()


@pytest.mark.parametrize("path", [b"/generate", b"/generate_stream"])
async def test_a_client_that_goes_away_with_requests_pipelined_frees_everything(path: bytes) -> None:
    def script(queued: QueuedRequest) -> None:
        scripted.say(queued, "a", end=False)

    async with scripted.running(script=script, over_socket=True) as router, asyncio.timeout(10):
        _reader, writer = await connect(router)
        writer.write(post(path) + BODY + b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n" * 2)
        while not router.batcher.seen:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        writer.transport.abort()
        await router.idle()
        assert router.permits_taken == 0
        assert router.metrics.request_cancelled.value() == 1


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with scripted.running(over_socket=True) as router, asyncio.timeout(10):
        reader, writer = await connect(router)
        writer.write((post(b"/generate") + BODY + b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n") * 30)
        for _ in range(30):
            status, body = await read_response(reader)
            assert status == 200
            assert b"generated_text" in body
            assert await read_response(reader) == (200, b"")
        writer.close()
