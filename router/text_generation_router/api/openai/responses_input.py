"""Bodies of ``/v1/responses`` -> a chat. Pure. Nothing is kept between requests: what refers to another is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from text_generation_router.api.openai.parameters import refuse
from text_generation_router.api.openai.schemas import ChatBody
from text_generation_router.chat.messages import MAX_MESSAGES, FunctionCall, MessageBody, ToolCall
from text_generation_router.chat.tools import FunctionBody, NamedFunction, NamedTool, ToolBody
from text_generation_router.errors import ValidationError
from text_generation_router.generate_request import F32, U32, ShortText

MAX_ITEMS = 4 * MAX_MESSAGES
"""Of `input`. A message may come of several: thoughts and calls are items of their own."""


class Part(msgspec.Struct, frozen=True):
    type: str
    text: str = ""
    refusal: str = ""


class MessageItem(msgspec.Struct, frozen=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]


class CallItem(msgspec.Struct, frozen=True):
    call_id: str
    name: str
    arguments: str


class OutputItem(msgspec.Struct, frozen=True):
    call_id: str
    output: str | list[Part]


class ReasoningItem(msgspec.Struct, frozen=True):
    content: list[Part] | None = None


class TextFormat(msgspec.Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextOptions(msgspec.Struct, frozen=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class ResponseTool(msgspec.Struct, frozen=True):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(msgspec.Struct, frozen=True):
    type: str
    name: str | None = None


class ReasoningOptions(msgspec.Struct, frozen=True):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesBody(msgspec.Struct, frozen=True, kw_only=True):
    input: str | list[dict[str, Any]]
    model: ShortText | None = None
    instructions: str | None = None
    max_output_tokens: U32 | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    stream: bool | None = None
    temperature: F32 | None = None
    text: TextOptions | None = None
    tool_choice: str | ToolChoice | None = None
    tools: list[ResponseTool] | None = None
    top_p: F32 | None = None
    truncation: str | None = None
    # Say nothing of the answer.
    user: ShortText | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    service_tier: str | None = None
    store: bool | None = None
    """Nothing is kept whatever it says, and the answer says so: clients send nothing, which means true."""
    include: list[str] | None = None
    stream_options: Any = None
    # Refused.
    background: bool | None = None
    conversation: Any = None
    previous_response_id: str | None = None
    prompt: Any = None
    context_management: Any = None
    max_tool_calls: U32 | None = None
    moderation: Any = None
    top_logprobs: U32 | None = None


REFUSED = {
    "background": "an answer is given on the connection that asked for it",
    "conversation": "nothing is kept here: send the whole conversation as `input`",
    "previous_response_id": "nothing is kept here: send the whole conversation as `input`",
    "prompt": "there are no stored prompts",
    "context_management": "a conversation that is too long is refused",
    "moderation": "nothing is moderated here",
    "max_tool_calls": "this server calls no tools by itself",
    "top_logprobs": "use `/v1/chat/completions`",
}


def chat_of(body: ResponsesBody) -> ChatBody:
    """Raises: ValidationError."""
    refuse(body, REFUSED)
    if body.truncation not in (None, "disabled"):
        raise ValidationError("`truncation` is not supported: a conversation that is too long is refused")
    if body.include:
        raise ValidationError(f"`include` of {body.include[0]} is not supported")
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        raise ValidationError("`verbosity` is not supported: say in a message how long the answer should be")
    if body.reasoning is not None and (body.reasoning.summary or body.reasoning.generate_summary):
        raise ValidationError("summaries of `reasoning` are not supported: it is answered as it is")
    if isinstance(body.stream_options, dict) and body.stream_options.get("include_obfuscation"):
        raise ValidationError("`include_obfuscation` is not supported")
    form = body.text.format if body.text is not None else None
    tools = [_tool(tool) for tool in body.tools or ()]
    messages = [] if body.instructions is None else [MessageBody("system", body.instructions)]
    if isinstance(body.input, str):
        messages.append(MessageBody("user", body.input))
    else:
        if len(body.input) > MAX_ITEMS:
            raise ValidationError(f"`input` may have {MAX_ITEMS} items at most. Given: {len(body.input)}")
        messages += _messages(body.input)
    return ChatBody(
        model=body.model,
        messages=messages,
        max_tokens=body.max_output_tokens,
        stream=body.stream,
        temperature=body.temperature,
        top_p=body.top_p,
        tools=tools or None,
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls if tools else None,
        response_format=None if form is None or form.type == "text" else _format(form),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        service_tier=body.service_tier,
    )


def _format(form: TextFormat) -> dict[str, Any]:
    if form.type == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.schema}}


def _tool(tool: ResponseTool) -> ToolBody:
    if tool.type != "function" or tool.name is None:
        raise ValidationError(f"tools of the type `{tool.type}` are not supported: this server runs none")
    return ToolBody(FunctionBody(tool.name, tool.description, tool.parameters))


def _choice(choice: str | ToolChoice | None) -> str | NamedTool | None:
    if not isinstance(choice, ToolChoice):
        return choice
    if choice.type != "function" or choice.name is None:
        raise ValidationError(f"`tool_choice` of the type `{choice.type}` is not supported")
    return NamedTool(NamedFunction(choice.name))


def _messages(items: Iterable[dict[str, Any]]) -> list[MessageBody]:
    """Calls that follow one another, or a message of the assistant, are one message, as templates know them."""
    messages: list[MessageBody] = []
    for item in items:
        kind = item.get("type", "message")
        try:
            match kind:
                case "message":
                    message = msgspec.convert(item, MessageItem)
                    _add_message(messages, MessageBody(message.role, _text(message.content)))
                case "function_call":
                    call = msgspec.convert(item, CallItem)
                    _add_call(messages, ToolCall(FunctionCall(call.name, call.arguments), call.call_id))
                case "function_call_output":
                    output = msgspec.convert(item, OutputItem)
                    messages.append(MessageBody("tool", _text(output.output), tool_call_id=output.call_id))
                case "reasoning":
                    thought = _text(msgspec.convert(item, ReasoningItem).content or [])
                    if thought:
                        messages.append(MessageBody("assistant", "", reasoning_content=thought))
                case _:
                    raise ValidationError(f"items of the type `{kind}` are not supported in `input`")
        except msgspec.ValidationError as error:
            raise ValidationError(f"an item of `input` is none of the type `{kind}`: {error}") from None
    return messages


def _add_message(messages: list[MessageBody], message: MessageBody) -> None:
    last = messages[-1] if messages else None
    is_thought = last is not None and last.role == message.role and not last.content and not last.tool_calls
    if last is not None and is_thought:
        messages[-1] = msgspec.structs.replace(last, content=message.content)
    else:
        messages.append(message)


def _add_call(messages: list[MessageBody], call: ToolCall) -> None:
    last = messages[-1] if messages else None
    if last is not None and last.tool_calls is not None:
        last.tool_calls.append(call)
    elif last is not None and last.role == "assistant":
        messages[-1] = msgspec.structs.replace(last, tool_calls=[call])
    else:
        messages.append(MessageBody("assistant", None, tool_calls=[call]))


def _text(content: str | list[Part]) -> str:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content:
        if part.type not in ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"):
            raise ValidationError(f"content of the type `{part.type}` is not supported: this model reads text")
        texts.append(part.refusal if part.type == "refusal" else part.text)
    return "".join(texts)
