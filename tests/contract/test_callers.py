"""What requests say of themselves: priority, patience, whose they are; and who is refused when it is full."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
import scripted
from text_generation_router.admission import Permits
from text_generation_router.api import accounting
from text_generation_router.errors import Overloaded

BODY: dict[str, Any] = {"inputs": "hi"}
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("headers", "in_body", "expected"),
    [
        pytest.param({}, None, 0, id="nothing said"),
        pytest.param({"x-priority": "7"}, None, 7, id="a header"),
        pytest.param({"x-priority": "-10"}, None, -10, id="the lowest"),
        pytest.param({}, 3, 3, id="the body"),
        pytest.param({"x-priority": "7"}, 0, 0, id="the body has the last word"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/completions"])
async def test_priority(path: str, headers: dict[str, str], in_body: int | None, expected: int) -> None:
    body: dict[str, Any] = {"/generate": BODY, "/v1/completions": {"prompt": "hi"}}.get(path, CHAT)
    if in_body is not None:
        body = {**body, **({"parameters": {"priority": in_body}} if path == "/generate" else {"priority": in_body})}
    async with scripted.running() as router:
        response = await router.client.post(path, json=body, headers=headers)
        assert response.status_code == 200, response.text
        assert router.batcher.seen[0].request.priority == expected


@pytest.mark.parametrize(
    "headers",
    [
        {"x-priority": "11"},
        {"x-priority": "-11"},
        {"x-priority": "1.0"},
        {"x-priority": "high"},
        {"x-priority": ""},
        {"x-priority": "9" * 400},
        {"x-request-timeout-ms": "0"},
        {"x-request-timeout-ms": "-1"},
        {"x-request-timeout-ms": "1e3"},
        {"x-request-timeout-ms": str(25 * 3600 * 1000)},
    ],
)
async def test_headers_without_a_meaning_are_refused(headers: dict[str, str]) -> None:
    async with scripted.running() as router:
        response = await router.client.post("/generate", json=BODY, headers=headers)
        assert response.status_code == 422
        (name,) = headers
        assert f"the header `{name}` must be a whole number from" in response.json()["error"]
        assert not router.batcher.seen


@pytest.mark.parametrize("value", [11, -11, 1.5, "1", True])
async def test_a_priority_without_a_meaning_is_refused(value: object) -> None:
    async with scripted.running() as router:
        for path, body in (
            ("/generate", {**BODY, "parameters": {"priority": value}}),
            ("/v1/chat/completions", {**CHAT, "priority": value}),
        ):
            assert (await router.client.post(path, json=body)).status_code == 422


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
async def test_who_is_not_answered_in_time_is_told_so(path: str) -> None:
    async with scripted.running(script=scripted.silence) as router:
        body = BODY if path == "/generate" else CHAT
        response = await router.client.post(path, json=body, headers={"x-request-timeout-ms": "50"})
        assert response.status_code == 408
        assert "was not answered in the 0.05 s" in response.text
        await router.idle()
        assert router.metrics.request_failure.value(err="timeout") == 1


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/chat/completions"])
async def test_the_time_of_a_request_runs_before_it_is_queued(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with scripted.running() as router:
        forever = asyncio.Event()
        monkeypatch.setattr(router.inference._guidance, "admit", lambda grammar: forever.wait())
        grammar = {"type": "regex", "value": "a"}
        body = CHAT | {"response_format": grammar} if "chat" in path else BODY | {"parameters": {"grammar": grammar}}
        response = await router.client.post(path, json=body, headers={"x-request-timeout-ms": "50"})
        assert (response.status_code, response.json()["error_type"]) == (408, "timeout")
        assert not router.batcher.seen
        await router.idle()


async def test_a_stream_that_has_begun_ends_with_an_event() -> None:
    def script(queued: Any) -> None:
        scripted.say(queued, "one", end=False)

    async with scripted.running(script=script) as router:
        headers = {"x-request-timeout-ms": "200"}
        response = await router.client.post("/generate_stream", json=BODY, headers=headers)
        assert response.status_code == 200
        assert '"error_type":"timeout"' in response.text
        await router.idle()


async def test_whoever_is_refused_learns_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scripted.running(max_concurrent_requests=0) as router:
        monkeypatch.setattr(router.batcher.backlog, "turn_away", lambda: 7)
        response = await router.client.post("/generate", json=BODY)
        assert (response.status_code, response.headers["retry-after"]) == (429, "7")


async def test_a_full_server_logs_many_refusals_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(accounting, "_refusals", accounting._Refusals())
    monkeypatch.setattr(accounting, "REFUSALS_TOLD_EVERY_S", 3600.0)
    async with scripted.running(max_concurrent_requests=0) as router:
        for number in range(21):
            if number == 20:
                monkeypatch.setattr(accounting, "REFUSALS_TOLD_EVERY_S", 0.0)
            assert (await router.client.post("/generate", json=BODY)).status_code == 429
        assert router.metrics.request_failure.value(err="overloaded") == 21
    assert [record.getMessage() for record in caplog.records if "429" in record.getMessage()] == [
        "generate failed with 429: overloaded",
        "generate failed with 429: overloaded, and 19 since the last such line",
    ]


PATHS_OF_PLACES = [
    *("/", "/generate", "/generate_stream", "/invocations", "/vertex", "/v1/chat/completions", "/v1/completions"),
    *("/v1/responses", "/v1/messages", "/v1/embeddings", "/embed"),
]


@pytest.mark.parametrize("path", PATHS_OF_PLACES)
async def test_a_full_server_refuses_before_it_reads(path: str) -> None:
    async with scripted.running(max_concurrent_requests=0, over_socket=True) as router, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(router.client.base_url.host, router.client.base_url.port)
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 20\r\n\r\n"
        writer.write(head.encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after: 1\r\n" in answer
        assert b"access-control-allow-origin: *\r\n" in answer
        assert b"connection: close" not in answer
        (length,) = re.findall(rb"content-length: (\d+)", answer)
        error = json.loads(await reader.readexactly(int(length)))
        if path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"):
            assert error["error"]["type"] == "rate_limit_error"
        elif path == "/v1/messages":
            assert error["error"]["type"] == "rate_limit_error" and error["type"] == "error"
        else:
            assert error == {"error": "Model is overloaded", "error_type": "overloaded"}
        assert router.metrics.request_count.value() == router.metrics.request_failure.value(err="overloaded") == 1
        # The body comes late, and the connection serves on.
        writer.write(b"{" + b" " * 18 + b"}GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.transport.abort()


@pytest.mark.parametrize(("version", "closes"), [("1.0", True), ("1.1", False)])
async def test_a_full_server_refuses_all_requests_of_a_connection(version: str, closes: bool) -> None:
    request = f"POST /generate HTTP/{version}\r\nhost: x\r\ncontent-length: 2\r\n\r\n{{}}".encode()
    async with scripted.running(max_concurrent_requests=0, over_socket=True) as router, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(router.client.base_url.host, router.client.base_url.port)
        writer.write(request * 20 + b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        received = await reader.read(-1)
        assert received.count(b"HTTP/1.1 429 ") == (1 if closes else 20)
        assert received.count(b'"error_type":"overloaded"}') == (1 if closes else 20)
        assert received.count(b"HTTP/1.1 200 ") == (0 if closes else 1)
        assert received.count(b"connection: close") == 1
        writer.transport.abort()


async def test_who_stands_behind_a_running_request_is_refused_when_its_turn_comes() -> None:
    release = asyncio.Event()

    async def say_late(queued: Any) -> None:
        await release.wait()
        scripted.say(queued, "a")

    tasks: list[asyncio.Task[None]] = []
    request = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n"
    async with (
        scripted.running(
            script=lambda queued: tasks.append(asyncio.create_task(say_late(queued))),
            max_concurrent_requests=1,
            over_socket=True,
        ) as router,
        asyncio.timeout(20),
    ):
        reader, writer = await asyncio.open_connection(router.client.base_url.host, router.client.base_url.port)
        writer.write((request + b'{"inputs":"hi"}') * 3)
        while not tasks:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        assert (await router.client.post("/generate", json=BODY)).status_code == 429
        release.set()
        for _ in range(3):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 "), "the place of the one before is free"
            (length,) = re.findall(rb"content-length: (\d+)", head)
            await reader.readexactly(int(length))
        writer.transport.abort()


async def test_a_full_server_still_tells_who_may_ask_what() -> None:
    key = {"authorization": "Bearer k"}
    async with scripted.running(max_concurrent_requests=0, api_key="k", over_socket=True) as router:
        client = router.client
        assert (await client.post("/generate", json=BODY)).status_code == 401
        assert (await client.post("/generate", json=BODY, headers=key)).status_code == 429
        assert (await client.post("/generate", json=BODY, headers=key | {"expect": "100-continue"})).status_code == 429
        assert (await client.post("/tokenize", json=BODY, headers=key)).status_code == 200
        assert (await client.get("/generate", headers=key)).status_code == 405
        assert (await client.options("/generate")).status_code == 200
        router.drain.begin()
        router.inference.drain()
        assert (await client.post("/generate", json=BODY, headers=key)).status_code == 503


async def test_a_queue_of_a_given_length() -> None:
    async with scripted.running(script=scripted.silence, max_queue_size=2) as router:
        waiting = [asyncio.create_task(router.client.post("/generate", json=BODY)) for _ in range(2)]
        while len(router.batcher.running) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        response = await router.client.post("/generate", json=BODY)
        assert response.status_code == 429
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"authorization": "Bearer k"}, {"authorization": "bearer  k"}, True),
        ({"authorization": "Bearer k"}, {"x-api-key": "k"}, True),
        ({"authorization": "Bearer k"}, {"authorization": "Bearer K"}, False),
        ({}, {"authorization": "Basic k"}, False),
        ({}, {"authorization": "Bearer k"}, False),
    ],
)
async def test_a_key_is_one_tenant_however_it_is_sent(one: dict[str, str], other: dict[str, str], same: bool) -> None:
    async with scripted.running() as router:
        for headers in (one, other):
            assert (await router.client.post("/generate", json=BODY, headers=headers)).status_code == 200
        first, second = (queued.request for queued in router.batcher.seen)
        assert (first.tenant == second.tenant) is same
        assert (first.cache_salt == second.cache_salt) is same


def test_no_tenant_takes_the_places_of_the_others() -> None:
    permits = Permits(16, (b"a", b"b"))
    taken = []
    with pytest.raises(Overloaded):
        while True:
            taken.append(permits.take(b"a"))
    assert len(taken) == 12
    others = [permits.take(b"b") for _ in range(4)]
    for tenant in (b"a", b"b", b""):
        with pytest.raises(Overloaded):
            permits.take(tenant)
    taken.pop().release()
    with pytest.raises(Overloaded):
        Permits(0, (b"a", b"b")).take(b"a")
    assert permits.num_taken == len(taken) + len(others)


def test_a_tenant_alone_may_take_all() -> None:
    for tenants in ((), (b"a",)):
        permits = Permits(5, tenants)
        assert len([permits.take(b"a") for _ in range(5)]) == 5
