"""The chat template, rendered by `transformers`, and that training renders it alike."""

from typing import Any

import pytest
from text_generation_server.embedded_model import embedded_model_path
from text_generation_server.embedded_model.recipe.example import chat
from transformers import AutoTokenizer

TOKENIZER = AutoTokenizer.from_pretrained(embedded_model_path())

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather's state",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "The city, e.g. Paris"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer"},
            },
            "required": ["city", "unit"],
        },
    },
}
CALL = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
SAME_CALL_AS_TEXT = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}


def test_a_question() -> None:
    assert _render([{"role": "user", "content": "Hi"}]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_system_message_and_an_earlier_turn() -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    assert _render(messages) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )


def test_content_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]
    assert "user\nHi there<|im_end|>" in _render([{"role": "user", "content": parts}])


def test_tools_stand_in_the_system_turn_with_the_parameters_that_they_require() -> None:
    assert _render([{"role": "user", "content": "Hi"}], tools=[WEATHER]).startswith(
        '<|im_start|>system\n<tools>\n{"name": "get_weather", "description": "Get the weather\'s state", '
        '"parameters": {"city": "string", "unit": "celsius|fahrenheit"}}\n</tools><|im_end|>\n<|im_start|>user\n'
    )


def test_tools_follow_the_system_message() -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert _render(messages, tools=[WEATHER]).startswith("<|im_start|>system\nBe kind.\n\n<tools>\n")


@pytest.mark.parametrize("parameters", [None, {}, {"type": "object"}, {"type": "object", "properties": {}}])
def test_a_tool_may_take_nothing(parameters: dict[str, Any] | None) -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": parameters}}
    rendered = _render([{"role": "user", "content": "Hi"}], tools=[tool])
    assert '{"name": "now", "description": "", "parameters": {}}' in rendered


@pytest.mark.parametrize("call", [CALL, SAME_CALL_AS_TEXT])
def test_a_tool_call_and_its_result(call: dict[str, Any]) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ]
    assert _render(messages).endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_a_generation_prompt_the_chat_ends_with_its_last_turn() -> None:
    rendered = TOKENIZER.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n"


def test_training_renders_as_serving_does() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "It's <b> & more"},
        {"role": "user", "content": "é 🙂"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, SAME_CALL_AS_TEXT]},
        {"role": "tool", "content": "sunny"},
    ]
    assert chat("any", messages, "x", tools=[WEATHER]).prompt == _render(messages, tools=[WEATHER])


def _render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
    rendered: str = TOKENIZER.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    return rendered
