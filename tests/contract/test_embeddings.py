"""``/v1/embeddings``, ``/embed`` and lists on ``/``: bodies, forms, refusals."""

from __future__ import annotations

import base64
import json
from array import array
from typing import Any

import pytest
import scripted
from text_generation_router.embedding.requests import MAX_INPUTS
from text_generation_router.scheduling.requests import QueuedRequest


def embed(queued: QueuedRequest) -> None:
    """The number of tokens, and the first of them."""
    assert queued.request.embeds
    assert queued.request.max_new_tokens == 1
    queued.embedding = array("f", [queued.num_prompt_tokens, queued.request.input_ids[0]]).tobytes()
    scripted.say(queued, "x")


async def test_openais_form() -> None:
    async with scripted.running(script=embed) as router:
        response = await router.client.post("/v1/embeddings", json={"input": ["abc", "b"], "model": "tgi"})
        await router.idle()
    assert response.status_code == 200
    assert response.json() == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [3.0, 64.0]},
            {"object": "embedding", "index": 1, "embedding": [1.0, 65.0]},
        ],
        "model": "test/model",
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }
    assert response.headers["x-prompt-tokens"] == "4"
    assert response.headers["x-compute-characters"] == "4"


@pytest.mark.parametrize(
    ("given", "vectors"),
    [
        ("abc", [[3.0, 64.0]]),
        ([7, 8], [[2.0, 7.0]]),
        ([[7, 8], [9]], [[2.0, 7.0], [1.0, 9.0]]),
        (["a", [9]], [[1.0, 64.0], [1.0, 9.0]]),
    ],
)
async def test_ways_to_give_inputs(given: Any, vectors: list[list[float]]) -> None:
    async with scripted.running(script=embed) as router:
        response = await router.client.post("/v1/embeddings", json={"input": given})
        assert [each["embedding"] for each in response.json()["data"]] == vectors
        response = await router.client.post("/v1/embeddings", json={"input": given, "encoding_format": "base64"})
        texts = [each["embedding"] for each in response.json()["data"]]
        assert [array("f", base64.b64decode(text)).tolist() for text in texts] == vectors


async def test_other_servers_form_and_lists_on_the_root() -> None:
    async with scripted.running(script=embed) as router:
        for path in ("/embed", "/", "/invocations"):
            response = await router.client.post(path, json={"inputs": ["abc", "b"], "normalize": True})
            assert response.status_code == 200
            first, second = response.json()
            assert first == pytest.approx([3 / 4105**0.5, 64 / 4105**0.5])
            assert second == pytest.approx([1 / 4226**0.5, 65 / 4226**0.5])
        response = await router.client.post("/embed", json={"inputs": "abc"})
        assert response.json() == [[3.0, 64.0]]
        response = await router.client.post("/embed", json={"inputs": "x" * 200, "truncate": True})
        assert response.json()[0][0] == 100


async def test_a_text_on_the_root_is_answered() -> None:
    async with scripted.running() as router:
        response = await router.client.post("/", json={"inputs": "abc"})
        assert response.json() == [{"generated_text": "abcHello wörld"}]


async def test_many_texts_take_one_permit() -> None:
    async with scripted.running(script=embed, max_concurrent_requests=1) as router:
        response = await router.client.post("/embed", json={"inputs": ["abc"] * MAX_INPUTS})
        assert len(response.json()) == MAX_INPUTS
        await router.idle()
        assert router.metrics.request_success.value() == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": []}, "`inputs` cannot be empty"),
        ({"input": ""}, "`inputs` cannot be empty"),
        ({"input": [""]}, "`inputs` cannot be empty"),
        ({"input": ["a", 1]}, "`input` is a text, a list of texts"),
        ({"input": [512]}, "must be less than 512"),
        ({"input": "x" * 101}, "at most 100 tokens. Given: 101"),
        ({"input": ["a"] * 2049}, "may be 2048 at most"),
        ({"input": "a", "dimensions": 1}, "`dimensions` must be what the model was trained for: 2"),
    ],
)
async def test_refusals(body: dict[str, Any], message: str) -> None:
    async with scripted.running(script=embed) as router:
        response = await router.client.post("/v1/embeddings", json=body)
        await router.idle()
        assert response.status_code == 422
        assert message in response.json()["error"]["message"]
        assert router.batcher.seen == []


async def test_another_model_is_not_found() -> None:
    async with scripted.running(script=embed) as router:
        response = await router.client.post("/v1/embeddings", json={"input": "a", "model": "other"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embed"])
async def test_bodies_of_the_wrong_type(path: str) -> None:
    async with scripted.running(script=embed) as router:
        bodies: list[Any] = [{}, {"input": {}, "inputs": {}}, {"input": "a", "inputs": "a", "dimensions": -1}]
        for body in bodies:
            response = await router.client.post(
                path, content=json.dumps(body), headers={"content-type": "application/json"}
            )
            assert response.status_code == 422
