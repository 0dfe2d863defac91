"""`/v1/responses`: the stateless core, as OpenAI's SDK expects it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import scripted
from contract.test_chat import TOOL_TEMPLATE, calling
from text_generation_router.errors import GenerationFailed
from text_generation_router.scheduling.requests import FinishReason, QueuedRequest, TokenEvent

PATH = "/v1/responses"
TOOLS = [
    {
        "type": "function",
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
]


async def ask(body: dict[str, Any], status: int = 200, **options: Any) -> Any:
    async with scripted.running(**options) as router:
        response = await router.client.post(PATH, json={"model": "tgi", "input": "Hi"} | body)
        assert response.status_code == status, response.text
        await router.idle()
        return response.json()


async def events(body: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    async with scripted.running(**options) as router:
        response = await router.client.post(PATH, json={"model": "tgi", "input": "Hi", "stream": True} | body)
        assert response.status_code == 200, response.text
        await router.idle()
    *parts, rest = response.text.split("\n\n")
    assert rest == ""
    read = []
    for number, part in enumerate(parts):
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert (name, event["sequence_number"]) == (f"event: {event['type']}", number)
        read.append(event)
    return read


def ending(*words: str) -> scripted.Script:
    def script(queued: QueuedRequest) -> None:
        scripted.say(queued, *words, end=False)
        event = TokenEvent(len(words) + 1, scripted.EOS, None)
        event.finished = scripted.finished("".join(words), len(words) + 1, queued, FinishReason.EOS_TOKEN)
        queued.stream.put(event)
        queued.stream.close()

    return script


async def test_an_answer() -> None:
    answer = await ask({}, script=ending("Hello"))
    assert (answer["object"], answer["status"], answer["store"]) == ("response", "completed", False)
    (item,) = answer["output"]
    assert item.pop("id").startswith("msg-")
    part = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    assert item == {"type": "message", "role": "assistant", "status": "completed", "content": [part]}
    assert answer["usage"]["output_tokens"] == 2


async def test_an_answer_that_is_cut_off() -> None:
    answer = await ask({"max_output_tokens": 3})
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


async def test_a_stream() -> None:
    said = await events({}, script=ending("Hel", "lo"))
    assert [event["type"].removeprefix("response.") for event in said] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert said[0]["response"]["output"] == []
    assert said[2]["item"]["content"] == []
    assert said[6]["text"] == "Hello"
    assert said[-1]["response"]["output"] == [said[-2]["item"]]


async def test_a_call_and_its_result() -> None:
    options: dict[str, Any] = {"script": calling, "chat_template": TOOL_TEMPLATE}
    answer = await ask({"tools": TOOLS}, **options)
    message, call = answer["output"]
    assert message["content"][0]["text"] == "Look:"
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "weather", '{"city": "Paris"}')
    said = await events({"tools": TOOLS}, **options)
    parts = [event["delta"] for event in said if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(parts) == call["arguments"]
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}, message, call,
             {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}]  # fmt: skip
    async with scripted.running(chat_template=TOOL_TEMPLATE, max_input_tokens=300, max_total_tokens=400) as router:
        body = {"model": "tgi", "input": items, "tools": TOOLS, "instructions": "Be brief"}
        assert (await router.client.post(PATH, json=body)).status_code == 200
        assert router.batcher.seen[0].request.inputs == (
            f'weather,<system>Be brief<user>Hi<assistant>Look:<tool_call>{{"city": "Paris"}}{call["call_id"]}'
            f"<tool>sunny{call['call_id']}"
        )


async def test_reasoning_is_an_item_of_its_own() -> None:
    answer = await ask({}, script=ending("<think>", "Hm", "</think>", "Paris"), reasoning_parser="think")
    reasoning, message = answer["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm"}]
    assert message["content"][0]["text"] == "Paris"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"previous_response_id": "resp-1"}, "`previous_response_id` is not supported"),
        ({"conversation": "c"}, "`conversation` is not supported"),
        ({"background": True}, "`background` is not supported"),
        ({"truncation": "auto"}, "`truncation` is not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools of the type `web_search`"),
        ({"include": ["message.output_text.logprobs"]}, "`include`"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "items of the type `item_reference`"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "content of the type `input_image`"),
        ({"input": [{"role": "user"}]}, "is none of the type `message`"),
        ({"input": [{"role": "user", "content": "a"}] * 4097}, "`input` may have 4096 items at most. Given: 4097"),
        ({"max_output_tokens": 5000}, "must be <= 120"),
    ],
)
async def test_what_cannot_be_honoured_is_refused(body: dict[str, Any], message: str) -> None:
    for stream in (False, True):
        assert message in (await ask(body | {"stream": stream}, 422))["error"]["message"]


async def test_a_failure_within_a_stream_is_said_twice() -> None:
    def script(queued: QueuedRequest) -> None:
        scripted.say(queued, "Hel", end=False)
        queued.stream.fail(GenerationFailed("Server error: boom"))

    said = await events({}, script=script)
    assert [event["type"] for event in said[-2:]] == ["error", "response.failed"]
    assert said[-1]["response"]["status"] == "failed"
