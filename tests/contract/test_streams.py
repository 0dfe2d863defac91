"""Server-sent events: frames, statuses, ends, and clients that go away. Over real sockets where it matters."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import httpx2
import pytest
import scripted
from integration.asking import message
from text_generation_router import http_protocol, listening
from text_generation_router.api import sse
from text_generation_router.errors import GenerationFailed, ShuttingDown
from text_generation_router.scheduling.requests import QueuedRequest

BODY = {"inputs": "hi"}


def event(index: int, text: str, end: str = "null", details: str = "null", top: str = "") -> str:
    token = f'{{"id":{index},"text":"{text}","logprob":{-0.5 * index},"special":false}}'
    return f'data: {{"index":{index},"token":{token},{top}"generated_text":{end},"details":{details}}}\n\n'


async def test_frames() -> None:
    async with scripted.running() as router:
        response = await router.client.post("/generate_stream", json=BODY)
    assert response.text == event(1, "Hel") + event(2, "lo") + event(3, " wörld", '"Hello wörld"')
    headers = {
        name: value for name, value in response.headers.items() if name not in ("vary", "access-control-allow-origin")
    }
    assert headers == {
        "content-type": "text/event-stream",
        "cache-control": "no-cache",
        "x-compute-type": "cpu",
        "x-compute-characters": "2",
        "x-accel-buffering": "no",
    }


async def test_details_full_text_and_top_tokens_are_where_they_belong() -> None:
    parameters = {"details": True, "return_full_text": True, "top_n_tokens": 1, "do_sample": True, "seed": 4}
    async with scripted.running() as router:
        response = await router.client.post("/generate_stream", json=BODY | {"parameters": parameters})
    top = '"top_tokens":[{"id":1000,"text":"top0","logprob":-1.5,"special":false}],'
    details = '{"finish_reason":"length","generated_tokens":3,"seed":4,"input_length":2}'
    last = event(3, " wörld", '"hiHello wörld"', details, top)
    assert response.text == event(1, "Hel", top=top) + event(2, "lo", top=top) + last


async def test_the_compat_route_streams_when_asked() -> None:
    async with scripted.running() as router:
        response = await router.client.post("/", json=BODY | {"stream": True})
        assert response.headers["content-type"] == "text/event-stream"
        assert response.text.endswith('"generated_text":"hiHello wörld","details":null}\n\n')
        ignored = await router.client.post("/generate", json=BODY | {"stream": True})
        assert ignored.json() == {"generated_text": "Hello wörld"}


async def test_a_refusal_has_its_status_and_no_stream() -> None:
    async with scripted.running(max_concurrent_requests=0) as router:
        response = await router.client.post("/generate_stream", json=BODY)
        assert (response.status_code, response.headers["content-type"]) == (429, "application/json")
        assert response.json() == {"error": "Model is overloaded", "error_type": "overloaded"}


async def test_a_failure_before_the_first_token_has_its_status() -> None:
    async def fail_later(queued: QueuedRequest) -> None:
        await asyncio.sleep(0.05)
        queued.stream.fail(GenerationFailed("Server error: no"))

    tasks: list[asyncio.Task[None]] = []
    async with scripted.running(script=lambda queued: tasks.append(asyncio.create_task(fail_later(queued)))) as router:
        response = await router.client.post("/generate_stream", json=BODY)
        assert response.status_code == 424
        assert response.json()["error_type"] == "generation"


@pytest.mark.parametrize("together", [True, False], ids=["with the token", "after the token"])
async def test_a_failure_after_the_first_token_is_an_event_and_the_end(together: bool) -> None:
    async def fail_later(queued: QueuedRequest) -> None:
        await asyncio.sleep(0.05)
        queued.stream.fail(ShuttingDown())

    tasks: list[asyncio.Task[None]] = []

    def script(queued: QueuedRequest) -> None:
        scripted.say(queued, "a", end=False)
        if together:
            queued.stream.fail(ShuttingDown())
        else:
            tasks.append(asyncio.create_task(fail_later(queued)))

    async with scripted.running(script=script, over_socket=True) as router:
        response = await router.client.post("/generate_stream", json=BODY)
        error = '{"error":"Server is shutting down","error_type":"shutting_down"}'
        assert (response.status_code, response.text) == (200, event(1, "a") + f"data: {error}\n\n")
        await router.idle()
        assert router.metrics.request_failure.value(err="shutting_down") == 1


async def test_a_stream_without_tokens_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The status waits for the first token only so long; then, and in every silence, there are comments."""
    monkeypatch.setattr(sse, "FIRST_EVENT_S", 0.05)
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.1)

    async def slowly(queued: QueuedRequest) -> None:
        await asyncio.sleep(0.3)
        scripted.say(queued, "a", end=False)
        await asyncio.sleep(0.25)
        scripted.say(queued, "b")

    tasks: list[asyncio.Task[None]] = []
    async with (
        scripted.running(
            script=lambda queued: tasks.append(asyncio.create_task(slowly(queued))), over_socket=True
        ) as router,
        router.client.stream("POST", "/generate_stream", json=BODY) as response,
    ):
        assert response.status_code == 200
        text = (await response.aread()).decode()
    before, after = text.split(event(1, "a"))
    assert 2 <= before.count(":\n\n") <= 4
    assert before.replace(":\n\n", "") == ""
    assert after.endswith(event(2, "b", '"ab"').replace('"ab"', '"b"'))
    assert after.startswith(":\n\n")


async def read_one_event(response: httpx2.Response) -> None:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            return


@pytest.mark.parametrize("path", ["/generate_stream", "/generate", "/"])
@pytest.mark.parametrize("talkative", [True, False], ids=["mid-stream", "before the first token"])
async def test_a_client_that_goes_away_frees_everything(path: str, talkative: bool) -> None:
    def script(queued: QueuedRequest) -> None:
        if talkative:
            scripted.say(queued, "a", end=False)

    async with scripted.running(script=script, over_socket=True) as router:

        async def ask() -> None:
            async with router.client.stream("POST", path, json=BODY) as response:
                await read_one_event(response)

        clients = [asyncio.create_task(ask()) for _ in range(20)]
        async with asyncio.timeout(5):
            while len(router.batcher.seen) < 20:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        await router.idle()
        assert router.metrics.request_cancelled.value() == router.metrics.request_count.value() == 20
        assert router.metrics.request_success.value() == 0


async def test_a_client_that_stops_reading_counts_as_gone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sse, "WRITE_STALL_S", 0.2)
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.1)
    flood: list[asyncio.Task[None]] = []

    async def pour(queued: QueuedRequest) -> None:
        while True:
            scripted.say(queued, "x" * 200_000, end=False)
            await asyncio.sleep(0.001)

    async with scripted.running(
        script=lambda queued: flood.append(asyncio.create_task(pour(queued))), over_socket=True
    ) as router:
        host, port = router.client.base_url.host, router.client.base_url.port
        _reader, writer = await asyncio.open_connection(host, port, limit=1)
        body = json.dumps(BODY).encode()
        writer.write(b"POST /generate_stream HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        writer.write(b"content-length: %d\r\n\r\n" % len(body) + body)
        async with asyncio.timeout(10):
            while router.metrics.request_cancelled.value() == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert router.permits_taken == 0
        flood[0].cancel()
        assert router.server is not None
        async with asyncio.timeout(5):  # the connection is closed, though the client has not read what is on its way
            while router.server.server_state.connections:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert not [record for record in caplog.records if record.levelname == "ERROR"]
        writer.transport.abort()
        await router.idle()


NUM_CHARACTERS = 8_000_000


def say_much(queued: QueuedRequest) -> None:
    scripted.say(queued, "x" * NUM_CHARACTERS)


async def slow_client(router: scripted.Router, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """It has asked for a large answer, and takes little at a time."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    sock.connect((router.client.base_url.host, router.client.base_url.port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1)
    writer.write(message(path, BODY))
    return reader, writer


@pytest.mark.parametrize(("path", "copies"), [("/generate", 1), ("/generate_stream", 2)])
async def test_a_client_that_reads_slowly_gets_all_of_a_large_answer(
    path: str, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Much later than a connection may be idle, and than a client may take nothing at all."""
    monkeypatch.setattr(listening, "KEEP_ALIVE_S", 0.1)
    for module in (http_protocol, sse):
        monkeypatch.setattr(module, "WRITE_STALL_S", 0.5)
    async with scripted.running(script=say_much, over_socket=True) as router, asyncio.timeout(30):
        reader, writer = await slow_client(router, path)
        size = 0
        began = time.monotonic()
        while size < copies * NUM_CHARACTERS:
            read = await reader.read(100_000)
            assert read, f"{size} characters came"
            size += read.count(b"x")
            await asyncio.sleep(0.02)
        assert time.monotonic() - began > 0.6
        writer.close()


async def test_a_client_that_does_not_take_its_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "KEEP_ALIVE_S", 0.1)
    monkeypatch.setattr(http_protocol, "WRITE_STALL_S", 0.5)
    async with scripted.running(script=say_much, over_socket=True) as router, asyncio.timeout(10):
        _, writer = await slow_client(router, "/generate")
        assert router.server is not None
        while not router.batcher.seen:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        while router.server.server_state.connections:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        writer.transport.abort()


async def test_128_streams_run_and_the_next_one_is_refused() -> None:
    release = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def script(queued: QueuedRequest) -> None:
        scripted.say(queued, "a", end=False)
        await release.wait()
        for _ in range(5):
            scripted.say(queued, "b", end=False)
            await asyncio.sleep(0)
        scripted.say(queued, "c")

    async with scripted.running(
        script=lambda queued: tasks.append(asyncio.create_task(script(queued))), over_socket=True
    ) as router:

        async def ask() -> str:
            response = await router.client.post("/generate_stream", json=BODY)
            assert response.status_code == 200
            return str(response.text)

        clients = [asyncio.create_task(ask()) for _ in range(128)]
        async with asyncio.timeout(20):
            while router.permits_taken < 128:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for path in ("/generate_stream", "/generate", "/"):
            refused = await router.client.post(path, json=BODY)
            assert (refused.status_code, refused.json()["error_type"]) == (429, "overloaded")
        assert (await router.client.post("/tokenize", json=BODY)).status_code == 200, "takes no permit"
        release.set()
        texts = await asyncio.gather(*clients)
        assert all(text.count("data: ") == 7 for text in texts)
        await router.idle()
        assert router.metrics.request_success.value() == 128
        assert router.metrics.request_failure.value(err="overloaded") == 3


async def test_the_permit_is_free_when_the_client_reads_the_end() -> None:
    async with scripted.running(max_concurrent_requests=1, over_socket=True) as router:
        for path in ("/generate_stream", "/generate") * 20:
            assert (await router.client.post(path, json=BODY)).status_code == 200


async def test_best_of_takes_a_permit_for_each_copy() -> None:
    body: dict[str, Any] = BODY | {"parameters": {"best_of": 2, "do_sample": True}}
    async with scripted.running(max_concurrent_requests=1, script=scripted.silence) as router:
        assert (await router.client.post("/generate", json=body)).status_code == 429
        await router.idle()
