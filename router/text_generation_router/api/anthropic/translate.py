"""Anthropic's messages -> a chat of OpenAI's. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from text_generation_router.api.anthropic.schemas import (
    MessagesBody,
    OutputConfig,
    OutputFormat,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolDefinition,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from text_generation_router.api.openai.schemas import ChatBody
from text_generation_router.chat.messages import MAX_MESSAGES, FunctionCall, MessageBody, ToolCall, check_number
from text_generation_router.chat.tools import FunctionBody, NamedFunction, NamedTool, ToolBody
from text_generation_router.errors import ValidationError

MAX_BLOCKS = 4 * MAX_MESSAGES
"""Of all messages: a result of a tool becomes a message, others become parts of one."""


def chat_of(body: MessagesBody) -> ChatBody:
    """Raises: ValidationError."""
    for name in ("container", "context_management", "inference_geo", "mcp_servers"):
        if getattr(body, name):
            raise ValidationError(f"`{name}` is not supported")
    if body.speed not in (None, "standard"):
        raise ValidationError(f"`speed` {body.speed} is not supported: there is one for all")
    if body.service_tier not in (None, "auto", "standard_only"):
        raise ValidationError(f"`service_tier` {body.service_tier} is not supported")
    if body.thinking is not None and body.thinking.type != "disabled":
        raise ValidationError("`thinking` cannot be asked for: this model thinks, or not, as its chat template says")
    output = body.output_config or OutputConfig()
    if output.task_budget is not None:
        raise ValidationError("`output_config.task_budget` is not supported: `max_tokens` bounds the answer")
    output_format = output.format or body.output_format
    choice = body.tool_choice
    tool_choice: str | NamedTool | None = None
    if choice is not None:
        tool_choice = {"auto": "auto", "any": "required", "none": "none"}.get(choice.type)
        if choice.type == "tool":
            if choice.name is None:
                raise ValidationError("`tool_choice` of the type tool needs a `name`")
            tool_choice = NamedTool(NamedFunction(choice.name))
    tools = None if body.tools is None else [_tool(tool) for tool in body.tools]
    one_call = choice is not None and choice.disable_parallel_tool_use
    return ChatBody(
        model=body.model,
        messages=list(_messages(body)),
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        stream=body.stream,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=False if one_call and tools else None,
        response_format=None if output_format is None else _response_format(output_format),
        reasoning_effort=output.effort,
    )


def _response_format(asked: OutputFormat) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": asked.schema}}


def _tool(tool: ToolDefinition) -> ToolBody:
    if tool.type not in (None, "custom"):
        raise ValidationError(f"tools of the type `{tool.type}` are not supported: this server runs none")
    return ToolBody(FunctionBody(tool.name, tool.description, tool.input_schema))


def _messages(body: MessagesBody) -> Iterable[MessageBody]:
    if body.system is not None:
        text = body.system if isinstance(body.system, str) else "\n".join(block.text for block in body.system)
        yield MessageBody("system", text)
    check_number(len(body.messages))
    num_blocks = sum(len(turn.content) for turn in body.messages if not isinstance(turn.content, str))
    if num_blocks > MAX_BLOCKS:  # before something is done with each of them
        raise ValidationError(f"`messages` may have {MAX_BLOCKS} blocks of content at most. Given: {num_blocks}")
    for turn in body.messages:
        yield from _turn(turn)


def _turn(turn: Turn) -> Iterable[MessageBody]:
    if isinstance(turn.content, str):
        yield MessageBody(turn.role, turn.content)
        return
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for block in turn.content:
        match block:
            case TextBlock(text):
                texts.append(text)
            case ThinkingBlock(thinking):
                thoughts.append(thinking)
            case RedactedThinkingBlock():
                pass
            case ToolUseBlock(call_id, name, given):
                calls.append(ToolCall(FunctionCall(name, given), call_id))
            case ToolResultBlock(call_id, content, is_error):
                # Templates know no results that failed: the model has to read it.
                result = f"Error: {_result(content)}" if is_error else _result(content)
                yield MessageBody("tool", result, tool_call_id=call_id)
            case _:
                kind = block.__struct_config__.tag
                raise ValidationError(f"content of the type `{kind}` is not supported: this model reads text")
    if texts or calls or thoughts:
        yield MessageBody(
            turn.role,
            "".join(texts) if texts or not calls else None,
            tool_calls=calls or None,
            reasoning_content="".join(thoughts) or None,
        )


def _result(content: object) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    assert isinstance(content, list)
    texts: list[str] = []
    for block in content:
        if not isinstance(block, TextBlock):
            raise ValidationError("images in the result of a tool are not supported: this model reads text")
        texts.append(block.text)
    return "".join(texts)
