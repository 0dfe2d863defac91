"""Messages as clients send them -> messages as chat templates know them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from text_generation_router.errors import ValidationError
from text_generation_router.json_depth import MAX_DEPTH, is_too_deep

MAX_MESSAGES = 1024
"""Templates look at all of them, some of them again and again."""


class TextPart(msgspec.Struct, frozen=True, tag="text", tag_field="type"):
    text: str


class ImagePart(msgspec.Struct, frozen=True, tag="image_url", tag_field="type"):
    """Read so that it can be refused by name."""


class AudioPart(msgspec.Struct, frozen=True, tag="input_audio", tag_field="type"):
    """Likewise."""


class FilePart(msgspec.Struct, frozen=True, tag="file", tag_field="type"):
    """Likewise."""


class RefusalPart(msgspec.Struct, frozen=True, tag="refusal", tag_field="type"):
    refusal: str


Part = TextPart | ImagePart | AudioPart | FilePart | RefusalPart


class FunctionCall(msgspec.Struct, frozen=True):
    name: str
    arguments: str | dict[str, Any] | None = None
    """OpenAI sends JSON in a text, TGI's users an object too."""
    parameters: dict[str, Any] | None = None
    """TGI's other name for it."""


class ToolCall(msgspec.Struct, frozen=True):
    function: FunctionCall
    id: str | int = ""
    type: Literal["function"] = "function"


class MessageBody(msgspec.Struct, frozen=True):
    """One message of a chat request."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | int | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    function_call: Any = None
    audio: Any = None


def check_number(num_messages: int) -> None:
    """Before something is done with each of them. Raises: ValidationError."""
    if num_messages > MAX_MESSAGES:
        raise ValidationError(f"`messages` may be {MAX_MESSAGES} at most. Given: {num_messages}")


def template_messages(messages: Sequence[MessageBody], *, knows_developer: bool) -> list[dict[str, Any]]:
    """What the template gets. ``knows_developer``: whether it has a role of that name, else it is the system's.

    Raises: ValidationError.
    """
    check_number(len(messages))
    return [_template_message(message, knows_developer=knows_developer) for message in messages]


def _template_message(message: MessageBody, *, knows_developer: bool) -> dict[str, Any]:
    if message.function_call is not None:
        raise ValidationError("`function_call` of a message is not supported, use `tool_calls`")
    if message.audio is not None:
        raise ValidationError("`audio` of a message is not supported")
    role = "system" if message.role == "developer" and not knows_developer else message.role
    content = _text(message.content)
    if content is None and message.refusal is not None:
        content = message.refusal
    if content is None and not message.tool_calls:
        raise ValidationError(f"a message of the role `{message.role}` needs `content` or `tool_calls`")
    # Templates concatenate the content, and test whether it is there.
    result: dict[str, Any] = {"role": role, "content": "" if content is None else content}
    if message.name is not None:
        result["name"] = message.name
    if message.tool_call_id is not None:
        result["tool_call_id"] = str(message.tool_call_id)
    if message.reasoning_content is not None:
        result["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        result["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    return result


def _text(content: str | list[Part] | None) -> str | None:
    if content is None or isinstance(content, str):
        return content
    pieces: list[str] = []
    for part in content:
        if isinstance(part, TextPart):
            pieces.append(part.text)
        elif isinstance(part, RefusalPart):
            pieces.append(part.refusal)
        else:
            kind = part.__struct_config__.tag
            raise ValidationError(f"content of the type `{kind}` is not supported: this model reads text")
    return "".join(pieces)


def _tool_call(call: ToolCall) -> dict[str, Any]:
    given = call.function
    arguments: Any = given.arguments if given.arguments is not None else (given.parameters or {})
    if isinstance(arguments, str):
        # Templates write arguments as JSON by themselves; a text would be quoted a second time.
        arguments = _parsed(arguments.encode(), given.name) if arguments.strip() else {}
    return {"id": str(call.id), "type": "function", "function": {"name": given.name, "arguments": arguments}}


def _parsed(arguments: bytes, name: str) -> Any:
    """As strictly as a body: what is no text, or nests too deep, would come to grief in the template."""
    try:
        parsed = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        raise ValidationError(f"`arguments` of the call of `{name}` are no JSON") from None
    if is_too_deep(arguments):
        raise ValidationError(f"`arguments` of the call of `{name}` have more than {MAX_DEPTH} levels")
    return parsed
