"""Bodies that never become a request: TGI's status and prefix, in plain text."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import scripted

JSON = {"content-type": "application/json"}
NOT_JSON = "Failed to parse the request body as JSON: "
WRONG_JSON = "Failed to deserialize the JSON body into the target type: "
ROUTES = ["/", "/generate", "/generate_stream", "/tokenize"]


def with_parameters(text: str) -> bytes:
    return b'{"inputs":"hi","parameters":{' + text.encode() + b"}}"


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"hello", id="no JSON"),
        pytest.param(b'{"inputs":"hi"', id="cut short"),
        pytest.param(b'{"inputs":"hi"} {}', id="trailing"),
        pytest.param(b'\xef\xbb\xbf{"inputs":"hi"}', id="byte order mark"),
        pytest.param('{"inputs":"hi"}'.encode("utf-16"), id="UTF-16"),
        pytest.param(b'{"inputs":"\xff\xfe"}', id="invalid UTF-8"),
        pytest.param(b'{"inputs":"hi","unknown":"\xff"}', id="invalid UTF-8 in a field that nobody reads"),
        pytest.param(b'{"inputs":"\\ud800"}', id="lone surrogate"),
        pytest.param(b'{"inputs":"a\x00b"}', id="raw NUL"),
        pytest.param(with_parameters('"temperature":NaN'), id="NaN"),
        pytest.param(with_parameters('"temperature":Infinity'), id="Infinity"),
        pytest.param(b'{"inputs":"hi","x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, id="far too deep"),
        pytest.param(b'{"inputs":"hi","x":' + b"[" * 1_000_000, id="only openings"),
    ],
)
async def test_400_what_is_not_json(path: str, content: bytes) -> None:
    async with scripted.running() as router:
        response = await router.client.post(path, content=content, headers=JSON)
        assert response.status_code == 400, response.text
        assert response.text.startswith(NOT_JSON)
        assert response.headers["content-type"] == "text/plain; charset=utf-8"
        assert router.metrics.request_count.value() == 0


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"[]", "Expected `object`, got `array`", id="no object"),
        pytest.param(b"{}", "missing field `inputs`", id="no inputs"),
        pytest.param(b'{"inputs":null}', "inputs: Expected `str`, got `null`", id="null inputs"),
        pytest.param(b'{"inputs":5}', "inputs: Expected `str`, got `int`", id="a number for inputs"),
        pytest.param(b'{"inputs":{}}', "inputs: Expected `str`, got `object`", id="an object for inputs"),
        pytest.param(
            b'{"inputs":"hi","x":' + b"[" * 65 + b"]" * 65 + b"}", "recursion limit exceeded: more", id="too deep"
        ),
        pytest.param(b'{"inputs":"hi","parameters":null}', "parameters: Expected `object`", id="null parameters"),
        pytest.param(with_parameters('"stop":null'), "parameters.stop: Expected `array`", id="null stop"),
        pytest.param(with_parameters('"stop":"x"'), "parameters.stop: Expected `array`", id="a string for stop"),
        pytest.param(with_parameters('"stop":["x",1]'), "parameters.stop[1]: Expected `str`", id="a number in stop"),
        pytest.param(with_parameters('"do_sample":null'), "parameters.do_sample: Expected `bool`", id="null do_sample"),
        pytest.param(with_parameters('"details":null'), "parameters.details: Expected `bool`", id="null details"),
        pytest.param(with_parameters('"details":1'), "parameters.details: Expected `bool`", id="1 for true"),
        pytest.param(with_parameters('"watermark":null'), "parameters.watermark: Expected `bool`", id="null watermark"),
        pytest.param(
            with_parameters('"decoder_input_details":null'), "parameters.decoder_input_details: Expected", id="null did"
        ),
        pytest.param(with_parameters('"adapter_id":7'), "parameters.adapter_id: Expected `str", id="number for a name"),
    ],
)
async def test_422_the_wrong_json(path: str, content: bytes, reason: str) -> None:
    async with scripted.running() as router:
        response = await router.client.post(path, content=content, headers=JSON)
        assert response.status_code == 422
        assert response.text.startswith(WRONG_JSON + reason)
        assert response.headers["content-type"] == "text/plain; charset=utf-8"


INTEGERS = {
    "best_of": (0, 2**64 - 1),
    "top_k": (-(2**31), 2**31 - 1),
    "max_new_tokens": (0, 2**32 - 1),
    "truncate": (0, 2**64 - 1),
    "seed": (0, 2**64 - 1),
    "top_n_tokens": (0, 2**32 - 1),
}
FLOATS = ["temperature", "repetition_penalty", "frequency_penalty", "top_p", "typical_p"]


@pytest.mark.parametrize("field", INTEGERS)
async def test_integers_are_integers_and_in_range(field: str) -> None:
    low, high = INTEGERS[field]
    async with scripted.running() as router:
        for value in (low - 1, high + 1, 2**70, "9" * 5000, '"5"', "true", "1.0", "1e2", "[]", "1e400"):
            content = with_parameters(f'"{field}":{value}')
            response = await router.client.post("/generate", content=content, headers=JSON)
            assert (response.status_code, response.text.startswith(WRONG_JSON)) == (422, True), (value, response.text)
        for value in (low, high):
            content = with_parameters(f'"{field}":{value}')
            response = await router.client.post("/generate", content=content, headers=JSON)
            assert not response.text.startswith(WRONG_JSON), (value, response.text)


@pytest.mark.parametrize("field", FLOATS)
async def test_floats_are_finite_32_bit_floats(field: str) -> None:
    async with scripted.running() as router:
        for value in ("1e39", "-1e39", "1e400", '"5"', "true", "[]"):
            content = with_parameters(f'"{field}":{value}')
            response = await router.client.post("/generate", content=content, headers=JSON)
            assert (response.status_code, response.text.startswith(WRONG_JSON)) == (422, True), (value, response.text)


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/xml", "multipart/form-data; boundary=x", "json", "text/json"]
)
async def test_415_without_a_json_content_type(content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    async with scripted.running() as router:
        response = await router.client.post("/generate", content=b'{"inputs":"hi"}', headers=headers)
        assert response.status_code == 415
        assert response.text == "Expected request with `Content-Type: application/json`"


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", "application/ld+json"])
async def test_content_types_that_are_json(content_type: str) -> None:
    async with scripted.running() as router:
        headers = {"content-type": content_type}
        response = await router.client.post("/generate", content=b'{"inputs":"hi"}', headers=headers)
        assert response.status_code == 200


async def test_415_for_a_compressed_body() -> None:
    async with scripted.running() as router:
        headers = JSON | {"content-encoding": "gzip"}
        response = await router.client.post("/generate", content=b'{"inputs":"hi"}', headers=headers)
        assert response.status_code == 415
        headers = JSON | {"content-encoding": "identity"}
        response = await router.client.post("/generate", content=b'{"inputs":"hi"}', headers=headers)
        assert response.status_code == 200


async def endless(sizes: list[int]) -> AsyncIterator[bytes]:
    yield b'{"inputs":"'
    while True:
        sizes.append(1000)
        yield b"x" * 1000


@pytest.mark.parametrize("path", ROUTES)
async def test_413_for_a_body_over_the_limit(path: str) -> None:
    async with scripted.running(payload_limit=10_000) as router:
        body = b'{"inputs":"' + b"x" * 10_000 + b'"}'
        response = await router.client.post(path, content=body, headers=JSON)
        assert response.status_code == 413
        assert response.text == "Failed to buffer the request body: length limit exceeded"


async def test_413_without_a_content_length_stops_reading_at_the_limit() -> None:
    async with scripted.running(payload_limit=10_000) as router:
        sizes: list[int] = []
        response = await router.client.post("/generate", content=endless(sizes), headers=JSON)
        assert response.status_code == 413
        assert sum(sizes) <= 12_000


async def test_a_body_at_the_limit_is_read() -> None:
    content = b'{"inputs":"hi"}'
    async with scripted.running(payload_limit=len(content)) as router:
        assert (await router.client.post("/generate", content=content, headers=JSON)).status_code == 200
        assert (await router.client.post("/generate", content=content + b" ", headers=JSON)).status_code == 413


async def test_unknown_fields_are_ignored_and_depth_inside_strings_is_none() -> None:
    content: dict[str, Any] = {"inputs": "[{" * 40 + '"\\', "model": "x", "parameters": {"extra": [[1]]}, "stream": 5}
    async with scripted.running() as router:
        assert (await router.client.post("/generate", json=content)).status_code == 200
        wrong = await router.client.post("/", json=content)
        assert wrong.text == WRONG_JSON + "stream: Expected `bool`, got `int`"
