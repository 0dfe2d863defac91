"""Anthropic's own SDK, unmodified, against a running server with the embedded model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from integration.launched import Launched

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0}
"""The SDK has no argument for it."""
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Get the weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture
def client(embedded: Launched) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=embedded.url, api_key="-", max_retries=0) as made:
        yield made


def test_a_message(client: Any) -> None:
    answer = client.messages.create(model="tgi", max_tokens=40, messages=QUESTION, extra_body=GREEDY)
    (block,) = answer.content
    assert block.type == "text"
    assert "Paris" in block.text
    assert answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens > 1


def test_the_streaming_helper(client: Any) -> None:
    whole = client.messages.create(model="tgi", max_tokens=40, messages=QUESTION, extra_body=GREEDY)
    with client.messages.stream(model="tgi", max_tokens=40, messages=QUESTION, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert whole.content[0].type == "text"
    assert text == whole.content[0].text
    assert final.content[0].type == "text"
    assert final.content[0].text == text
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_tokens_are_counted(client: Any) -> None:
    counted = client.messages.count_tokens(model="tgi", messages=QUESTION)
    answer = client.messages.create(model="tgi", max_tokens=2, messages=QUESTION)
    assert counted.input_tokens == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)


def test_a_tool_is_called_and_its_result_answered(client: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    options: dict[str, Any] = {"model": "tgi", "max_tokens": 80, "extra_body": GREEDY, "tools": [WEATHER]}
    answer = client.messages.create(messages=messages, tool_choice={"type": "any"}, **options)
    assert answer.stop_reason == "tool_use"
    call = answer.content[-1]
    assert call.type == "tool_use"
    assert call.input.keys() == {"city"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny, 21 degrees"}
    messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(messages=messages, **options).content


def test_errors_are_the_sdks(client: Any) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="claude", max_tokens=5, messages=QUESTION)
    with pytest.raises(anthropic.UnprocessableEntityError, match="must be <="):
        client.messages.create(model="tgi", max_tokens=10**4, messages=QUESTION)


def test_the_asynchronous_client(embedded: Launched) -> None:
    async def answer() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=embedded.url, api_key="-", max_retries=0) as client,
            client.messages.stream(model="tgi", max_tokens=40, messages=QUESTION, extra_body=GREEDY) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert "Paris" in asyncio.run(answer())
