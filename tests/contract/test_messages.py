"""`/v1/messages`: as Anthropic's clients expect it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import scripted
from contract.test_chat import TOOL_TEMPLATE, calling
from text_generation_router.errors import GenerationFailed
from text_generation_router.scheduling.requests import FinishReason, QueuedRequest, Token, TokenEvent

PATH = "/v1/messages"
BODY: dict[str, Any] = {"model": "tgi", "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}
TOOLS = [{"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}]


async def ask(body: dict[str, Any], status: int = 200, path: str = PATH, **options: Any) -> Any:
    async with scripted.running(**options) as router:
        response = await router.client.post(path, json=BODY | body)
        assert response.status_code == status, response.text
        await router.idle()
        return response.json()


async def events(body: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    async with scripted.running(**options) as router:
        response = await router.client.post(PATH, json=BODY | {"stream": True} | body)
        assert response.status_code == 200, response.text
        await router.idle()
    *parts, rest = response.text.split("\n\n")
    assert rest == ""
    read = []
    for part in parts:
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        read.append(event)
    return read


async def test_an_answer() -> None:
    answer = await ask({})
    assert answer.pop("id").startswith("msg-")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "test/model",
        "content": [{"type": "text", "text": "Hello wörld", "citations": None}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 20,
            "output_tokens": 3,
            "cache_read_input_tokens": 0,
            "cache_creation_input_tokens": 0,
        },
    }


async def test_a_stream() -> None:
    said = await events({})
    assert [event["type"] for event in said] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert [event["delta"] for event in said[2:5]] == [
        {"type": "text_delta", "text": text} for text in ("Hel", "lo", " wörld")
    ]
    assert said[6]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert said[6]["usage"]["output_tokens"] == 3
    assert said[0]["message"]["usage"] == said[6]["usage"] | {"output_tokens": 0}


async def test_what_the_template_gets() -> None:
    body = {
        "system": [{"type": "text", "text": "Be brief"}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "P"}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "sunny"}]},
        ],
        "tools": TOOLS,
    }
    async with scripted.running(chat_template=TOOL_TEMPLATE) as router:
        assert (await router.client.post(PATH, json=BODY | body | {"max_tokens": 5})).status_code == 200
        assert router.batcher.seen[0].request.inputs == (
            'weather,<system>Be brief<user>ab<assistant><tool_call>{"city": "P"}c1<tool>sunnyc1'
        )


async def test_a_call() -> None:
    options: dict[str, Any] = {"script": calling, "chat_template": TOOL_TEMPLATE}
    answer = await ask({"tools": TOOLS}, **options)
    text, call = answer["content"]
    assert text["text"] == "Look:"
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Paris"})
    said = await events({"tools": TOOLS}, **options)
    starts = [event["content_block"]["type"] for event in said if event["type"] == "content_block_start"]
    assert starts == ["text", "tool_use"]
    parts = [event["delta"] for event in said if event["type"] == "content_block_delta"]
    assert "".join(part.get("partial_json", "") for part in parts) == '{"city": "Paris"}'
    assert [event["index"] for event in said if event["type"] == "content_block_stop"] == [0, 1]


@pytest.mark.parametrize("wrapped", [True, False])
async def test_an_answer_that_obeys_a_schema(wrapped: bool) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    form = {"type": "json_schema", "schema": schema}
    async with scripted.running() as router:
        router.take_any_grammar()
        asked = {"output_config": {"format": form}} if wrapped else {"output_format": form}
        assert (await router.client.post(PATH, json=BODY | asked)).status_code == 200
        grammar = router.batcher.seen[0].request.grammar
    assert grammar is not None
    assert json.loads(grammar.source) == schema


async def test_the_stop_sequence_is_named() -> None:
    def script(queued: QueuedRequest) -> None:
        event = TokenEvent(1, Token(1, "a END", -1.0, special=False), None)
        event.finished = scripted.finished("a END", 1, queued, FinishReason.STOP_SEQUENCE)
        queued.stream.put(event)
        queued.stream.close()

    answer = await ask({"stop_sequences": ["END"]}, script=script)
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "END")
    assert answer["content"][0]["text"] == "a "


async def test_tokens_are_counted_without_an_answer() -> None:
    body = {"model": "tgi", "messages": BODY["messages"]}
    assert await ask(body, path=f"{PATH}/count_tokens") == {"input_tokens": 20}


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"max_tokens": None}, 422, "invalid_request_error"),
        ({"max_tokens": 5000}, 422, "invalid_request_error"),
        ({"model": "claude"}, 404, "not_found_error"),
        ({"mcp_servers": [{}]}, 422, "invalid_request_error"),
        ({"inference_geo": "eu"}, 422, "invalid_request_error"),
        ({"speed": "fast"}, 422, "invalid_request_error"),
        ({"output_config": {"effort": "low"}}, 422, "invalid_request_error"),
        ({"output_config": {"task_budget": {"type": "tokens", "total": 5}}}, 422, "invalid_request_error"),
        ({"output_config": {"format": {"type": "json_schema"}}}, 422, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 422, "invalid_request_error"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 422, "invalid_request_error"),
        ({"messages": 5}, 422, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": "a"}] * 1025}, 422, "invalid_request_error"),
    ],
)
async def test_errors_have_anthropics_form(body: dict[str, Any], status: int, kind: str) -> None:
    for stream in (False, True):
        answer = await ask(body | {"stream": stream}, status)
        assert (answer["type"], answer["error"]["type"]) == ("error", kind)


@pytest.mark.parametrize(
    ("num_results", "said"),
    [
        (1025, "`messages` may be 1024 at most. Given: 1025"),
        (4097, "`messages` may have 4096 blocks of content at most. Given: 4097"),
    ],
)
async def test_results_of_tools_are_messages_and_no_more_of_them_are_read(num_results: int, said: str) -> None:
    results = [{"type": "tool_result", "tool_use_id": "c1", "content": "sunny"}] * num_results
    answer = await ask({"messages": [{"role": "user", "content": results}]}, 422)
    assert answer["error"]["message"] == f"Input validation error: {said}"


async def test_a_failure_within_a_stream_is_an_event() -> None:
    def script(queued: QueuedRequest) -> None:
        scripted.say(queued, "Hel", end=False)
        queued.stream.fail(GenerationFailed("Server error: boom"))

    assert (await events({}, script=script))[-1]["error"]["type"] == "api_error"


async def test_the_key_comes_in_a_header_of_its_own() -> None:
    async with scripted.running(api_key="secret") as router:
        assert (await router.client.post(PATH, json=BODY)).status_code == 401
        response = await router.client.post(PATH, json=BODY, headers={"x-api-key": "secret"})
        assert response.status_code == 200
        response = await router.client.post(PATH, json=BODY, headers={"x-api-key": "Secret"})
        assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")
