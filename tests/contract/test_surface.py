"""Routes, methods, keys, origins, and the small endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import scripted
from text_generation_router.scheduling.requests import QueuedRequest

OPEN = [("GET", "/"), ("GET", "/health"), ("GET", "/ping"), ("GET", "/live"), ("GET", "/metrics")]
PROTECTED = [
    ("POST", "/"),
    ("POST", "/generate"),
    ("POST", "/generate_stream"),
    ("POST", "/tokenize"),
    ("GET", "/info"),
]
BODY = {"inputs": "hi"}
ANY_ORIGIN = {"access-control-allow-origin": "*"}


@pytest.mark.parametrize(
    "path", ["/nope", "/generate/", "/GENERATE", "/generate;x", "/x%00", "/" + "x" * 4000, "/%2e/generate"]
)
async def test_404_is_empty(path: str) -> None:
    async with scripted.running(api_key="key") as router:
        for method in ("GET", "POST"):
            response = await router.client.request(method, path, json=BODY)
            assert (response.status_code, response.content) == (404, b"")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/generate", "POST"),
        ("/tokenize", "POST"),
        ("/info", "GET,HEAD"),
        ("/metrics", "GET,HEAD"),
        ("/", "GET,HEAD,POST"),
    ],
)
async def test_405_is_empty_and_names_the_methods(path: str, allowed: str) -> None:
    async with scripted.running() as router:
        response = await router.client.request("DELETE", path)
        assert (response.status_code, response.content) == (405, b"")
        assert response.headers["allow"] == allowed


async def test_without_a_key_everything_is_open() -> None:
    async with scripted.running() as router:
        for method, path in OPEN + PROTECTED:
            response = await router.client.request(method, path, json=BODY)
            assert response.status_code == 200, path


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer KEY", "Bearer key2", "Bearer ke", "Basic key", "key", "Bearer key key"],
)
async def test_401_without_the_right_key(authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    async with scripted.running(api_key="key") as router:
        for method, path in PROTECTED:
            response = await router.client.request(method, path, content=b"no JSON", headers=headers)
            assert (response.status_code, response.content) == (401, b""), path
            assert "www-authenticate" not in response.headers
        for method, path in OPEN:
            response = await router.client.request(method, path, headers=headers)
            assert response.status_code == 200, path


@pytest.mark.parametrize("authorization", ["Bearer key", "bearer key", "BEARER key "])
async def test_the_right_key_opens(authorization: str) -> None:
    async with scripted.running(api_key="key") as router:
        for method, path in PROTECTED:
            response = await router.client.request(method, path, json=BODY, headers={"authorization": authorization})
            assert response.status_code == 200, path


@pytest.mark.parametrize("target", ["//generate", "/v1/../generate", "/health/../generate", "@health", "/Generate"])
async def test_an_odd_path_opens_nothing(target: str) -> None:
    """Sent as it is: a client library would tidy it up."""
    async with scripted.running(api_key="key", over_socket=True) as router:
        base = router.client.base_url
        reader, writer = await asyncio.open_connection(base.host, base.port)
        writer.write(f"POST {target} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode())
        status = (await reader.readline()).split()[1]
        writer.close()
        assert status in (b"404", b"400", b"401")


async def test_the_host_header_does_not_open_a_route() -> None:
    async with scripted.running(api_key="key") as router:
        for host in ("a/health?", "x@health", "health"):
            response = await router.client.post("/generate", json=BODY, headers={"host": host})
            assert response.status_code == 401


async def test_cors_for_any_origin() -> None:
    async with scripted.running() as router:
        response = await router.client.post("/generate", json=BODY, headers={"origin": "https://a.example"})
        assert response.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in response.headers
        preflight = await router.client.options("/generate", headers={"origin": "https://a.example"})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-methods"] == "GET,POST"
        assert preflight.headers["access-control-allow-headers"] == "content-type"
        refused = await router.client.post("/generate", json={})
        assert refused.headers["access-control-allow-origin"] == "*", "an error can be read as well"


async def test_cors_for_listed_origins() -> None:
    async with scripted.running(origins=("https://a.example", "https://b.example")) as router:
        listed = await router.client.options("/generate", headers={"origin": "https://b.example"})
        assert listed.headers["access-control-allow-origin"] == "https://b.example"
        assert listed.headers["access-control-allow-headers"] == "content-type,authorization"
        other = await router.client.post("/generate", json=BODY, headers={"origin": "https://c.example"})
        assert "access-control-allow-origin" not in other.headers


async def test_health_tells_what_the_shards_say() -> None:
    async with scripted.running() as router:
        for path in ("/", "/health", "/ping", "/live"):
            response = await router.client.get(path)
            assert (response.status_code, response.content) == (200, b"")
        router.batcher.is_ready = False
        for path in ("/", "/health", "/ping"):
            response = await router.client.get(path)
            assert response.status_code == 503
            assert response.json() == {"error": "unhealthy", "error_type": "healthcheck"}
        assert (await router.client.get("/live")).status_code == 200
        assert (await router.client.head("/health")).status_code == 503


async def test_a_draining_server_takes_nothing_new() -> None:
    async with scripted.running() as router:
        router.drain.begin()
        router.inference.drain()
        for method, path in PROTECTED:
            response = await router.client.request(method, path, json=BODY)
            if method == "POST":
                assert response.status_code == 503
                assert response.json() == {"error": "Server is shutting down", "error_type": "shutting_down"}
                assert (response.headers["connection"], response.headers["retry-after"]) == ("close", "1")
        assert (await router.client.get("/health")).status_code == 503
        assert (await router.client.get("/live")).status_code == 200


async def test_info() -> None:
    async with scripted.running() as router:
        response = await router.client.get("/info")
    assert response.text == (
        '{"model_id":"test/model","model_sha":null,"model_pipeline_tag":null,"max_concurrent_requests":128,'
        '"max_best_of":2,"max_stop_sequences":4,"max_input_tokens":100,"max_total_tokens":120,"validation_workers":2,'
        '"max_client_batch_size":4,"router":"text-generation-router","version":"4.0.0","sha":null,"docker_label":null}'
    )


async def test_tokenize() -> None:
    """Offsets count bytes; of a character that is two tokens each has the whole."""
    async with scripted.running() as router:
        response = await router.client.post("/tokenize", json={"inputs": "aé!", "parameters": {"truncate": 1}})
    assert response.text == (
        '[{"id":64,"text":"a","start":0,"stop":1},{"id":127,"text":"é","start":1,"stop":3},'
        '{"id":102,"text":"é","start":1,"stop":3},{"id":0,"text":"!","start":3,"stop":4}]'
    )


async def test_nothing_tells_the_framework() -> None:
    async with scripted.running(over_socket=True) as router:
        response = await router.client.get("/health")
        assert "server" not in response.headers


def samples(text: str) -> Iterator[tuple[str, float]]:
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            yield name, float(value)


async def test_requests_equal_successes_failures_and_cancellations() -> None:
    def script(queued: QueuedRequest) -> None:
        scripted.say(queued, *"abc")

    async with scripted.running(script=script) as router:
        for path in ("/generate", "/generate_stream", "/"):
            await router.client.post(path, json=BODY)
            await router.client.post(path, json={"inputs": ""})
            await router.client.post(path, json={})
        response = await router.client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    values = dict(samples(response.text))
    failures = sum(value for name, value in values.items() if name.startswith("tgi_request_failure"))
    assert values["tgi_request_count"] == 6
    assert values["tgi_request_success"] == failures == 3
    assert values["tgi_request_cancelled"] == 0
    assert values["tgi_request_generated_tokens_sum"] == 9
    assert values["tgi_request_duration_count"] == values["tgi_request_duration_seconds_count"] == 3
    assert values['tgi_request_queue_duration_bucket{le="+Inf"}'] == 3
