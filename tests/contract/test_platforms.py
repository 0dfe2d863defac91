"""`/invocations` and `/vertex`: bodies of other routes under other paths."""

from __future__ import annotations

from typing import Any

import pytest
import scripted
from text_generation_router.errors import GenerationFailed
from text_generation_router.scheduling.requests import QueuedRequest

USER = [{"role": "user", "content": "Hi"}]


async def post(path: str, body: dict[str, Any], **options: Any) -> tuple[int, Any]:
    async with scripted.running(**options) as router:
        response = await router.client.post(path, json=body)
        await router.idle()
        is_json = response.headers.get("content-type") == "application/json"
        return response.status_code, response.json() if is_json else response.text


async def test_invocations_are_what_their_members_say() -> None:
    status, answer = await post("/invocations", {"inputs": "Hi", "parameters": {"return_full_text": False}})
    assert (status, answer) == (200, [{"generated_text": "Hello wörld"}])
    status, answer = await post("/invocations", {"messages": USER, "max_tokens": 5})
    assert (status, answer["object"]) == (200, "chat.completion")
    status, answer = await post("/invocations", {"prompt": "Hi"})
    assert (status, answer["object"]) == (200, "text_completion")
    status, answer = await post("/invocations", {"inputs": "Hi", "stream": True})
    assert (status, answer.count("data: ")) == (200, 3)


async def test_an_invocation_of_nothing() -> None:
    status, text = await post("/invocations", {"text": "Hi"})
    assert status == 422
    assert "data did not match any variant of untagged enum SagemakerRequest" in text


async def test_vertex() -> None:
    def script(queued: QueuedRequest) -> None:
        scripted.say(queued, f"{queued.request.inputs}:{queued.request.sampling.do_sample}")

    instances = [{"inputs": "a", "parameters": {"max_new_tokens": 5, "seed": 3}}, {"messages": USER, "temperature": 0}]
    async with scripted.running(script=script) as router:
        response = await router.client.post("/vertex", json={"instances": instances})
        assert response.status_code == 200
        assert response.json() == {"predictions": ["a:True", "<user>Hi</s><assistant>:False"]}
        assert (router.metrics.request_count.value(), router.metrics.request_success.value()) == (1, 1)


@pytest.mark.parametrize(
    ("instances", "status"),
    [([], 422), ([{"inputs": ""}], 422), ([{"text": "a"}], 422), ([{"inputs": "a"}] * 5, 422)],
)
async def test_what_vertex_refuses(instances: list[Any], status: int) -> None:
    assert (await post("/vertex", {"instances": instances}))[0] == status


async def test_one_instance_that_fails_fails_all() -> None:
    def script(queued: QueuedRequest) -> None:
        if queued.request.inputs == "b":
            queued.stream.fail(GenerationFailed("Server error: boom"))

    assert (await post("/vertex", {"instances": [{"inputs": "a"}, {"inputs": "b"}]}, script=script))[0] == 424
