"""OpenAI's own SDK, unmodified, against a running server with the embedded model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from integration.launched import Launched


@pytest.fixture
def client(embedded: Launched) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{embedded.url}/v1", api_key="-", max_retries=0) as made:
        yield made


QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(model="tgi", messages=QUESTION, temperature=0, max_tokens=30)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None


def test_chat_stream(client: Any) -> None:
    whole = client.chat.completions.create(model="tgi", messages=QUESTION, temperature=0)
    stream = client.chat.completions.create(
        model="tgi",
        messages=QUESTION,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_streaming_helper_assembles_the_message(client: Any) -> None:
    with client.chat.completions.stream(model="tgi", messages=QUESTION, temperature=0, logprobs=True) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert message.role == "assistant"
    assert "Paris" in (message.content or "")


def test_logprobs_and_several_answers(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tgi",
        messages=QUESTION,
        n=2,
        seed=5,
        logprobs=True,
        top_logprobs=2,
        max_tokens=20,
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None
        entries = choice.logprobs.content or []
        assert b"".join(bytes(entry.bytes or []) for entry in entries).decode() == choice.message.content
        assert all(len(entry.top_logprobs) == 2 for entry in entries)
        assert all(entry.logprob <= entry.top_logprobs[0].logprob + 1e-5 for entry in entries)


def test_a_bias_keeps_a_token_out(client: Any) -> None:
    first = client.completions.create(model="tgi", prompt=[5, 6, 7], temperature=0, max_tokens=1, logprobs=1)
    assert first.choices[0].logprobs is not None
    listed = client.chat.completions.create(model="tgi", messages=QUESTION, temperature=0, max_tokens=1)
    banned = {str(token): -100 for token in range(200)}
    other = client.chat.completions.create(
        model="tgi",
        messages=QUESTION,
        temperature=0,
        max_tokens=1,
        logit_bias=banned,
    )
    assert listed.choices[0].message.content is not None
    assert other.choices[0].message.content is not None


def test_completions(client: Any) -> None:
    whole = client.completions.create(model="tgi", prompt=["Once upon a time", "The"], temperature=0, max_tokens=8)
    assert [choice.index for choice in whole.choices] == [0, 1]
    stream = client.completions.create(model="tgi", prompt="Once upon a time", temperature=0, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_models(client: Any) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id


def test_errors_are_the_sdks(client: Any) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="`n` must be"):
        client.chat.completions.create(model="tgi", messages=QUESTION, n=0)
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-7", messages=QUESTION)
    assert unknown.value.code == "model_not_found"


def test_the_asynchronous_client(embedded: Launched) -> None:
    async def answers() -> list[str]:
        client: Any
        async with openai.AsyncOpenAI(base_url=f"{embedded.url}/v1", api_key="-", max_retries=0) as client:
            whole = await client.chat.completions.create(model="tgi", messages=QUESTION, temperature=0)
            stream = await client.chat.completions.create(
                model="tgi",
                messages=QUESTION,
                temperature=0,
                stream=True,
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return [whole.choices[0].message.content or "", text]

    whole, streamed = asyncio.run(answers())
    assert whole == streamed
    assert "Paris" in whole


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_a_tool_is_called_and_its_result_answered(client: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = client.chat.completions.create(
        model="tgi",
        messages=messages,
        tools=[WEATHER],
        tool_choice="required",
        temperature=0,
        max_tokens=80,
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls
    call = choice.message.tool_calls[0]
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments).keys() == {"city"}
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees"}]
    last = client.chat.completions.create(model="tgi", messages=messages, tools=[WEATHER], temperature=0, max_tokens=60)
    assert last.choices[0].message.content
    stream = client.chat.completions.create(
        model="tgi",
        messages=messages[:1],
        tools=[WEATHER],
        tool_choice="required",
        temperature=0,
        max_tokens=80,
        stream=True,
    )
    calls = [each for chunk in stream for each in chunk.choices[0].delta.tool_calls or ()]
    assert "".join(each.function.arguments or "" for each in calls if each.function) == call.function.arguments


class Person(pydantic.BaseModel):
    name: str
    age: int


def test_structured_output_is_parsed(client: Any) -> None:
    answer = client.chat.completions.parse(
        model="tgi",
        messages=[{"role": "user", "content": "Tom is 5 years old. Who is it? JSON"}],
        response_format=Person,
        temperature=0,
        max_tokens=80,
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_any_object(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tgi",
        messages=QUESTION,
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=60,
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content or ""), dict)


def test_responses(client: Any) -> None:
    answer = client.responses.create(model="tgi", input="What is the capital of France?", temperature=0)
    assert "Paris" in answer.output_text
    assert answer.status == "completed"
    assert answer.usage is not None
    again = client.responses.create(
        model="tgi",
        input=[*answer.output, {"role": "user", "content": "And of Italy?"}],
        temperature=0,
    )
    assert again.output_text
    with client.responses.stream(model="tgi", input="What is the capital of France?", temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == answer.output_text


def test_responses_parse_and_call_tools(client: Any) -> None:
    parsed = client.responses.parse(
        model="tgi", input="Tom is 5 years old. JSON", text_format=Person, temperature=0, max_output_tokens=80
    )
    assert isinstance(parsed.output_parsed, Person)
    tool = {"type": "function", "name": "get_weather", "parameters": WEATHER["function"]["parameters"], "strict": None}
    answer = client.responses.create(
        model="tgi",
        input="What is the weather in Paris?",
        tools=[tool],
        tool_choice="required",
        temperature=0,
    )
    (call,) = [item for item in answer.output if item.type == "function_call"][:1]
    assert json.loads(call.arguments).keys() == {"city"}
