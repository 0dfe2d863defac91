"""Bodies of ``/v1/messages``. Fields that mean something and are not honoured are listed, to be refused by name."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from text_generation_router.generate_request import F32, I32, U32, ShortText


class TextBlock(msgspec.Struct, frozen=True, tag="text", tag_field="type"):
    text: str


class ThinkingBlock(msgspec.Struct, frozen=True, tag="thinking", tag_field="type"):
    thinking: str


class RedactedThinkingBlock(msgspec.Struct, frozen=True, tag="redacted_thinking", tag_field="type"):
    """Of another server: it says nothing here."""


class ToolUseBlock(msgspec.Struct, frozen=True, tag="tool_use", tag_field="type"):
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(msgspec.Struct, frozen=True, tag="tool_result", tag_field="type"):
    tool_use_id: str
    content: str | list[TextBlock | ImageBlock] | None = None
    is_error: bool | None = None


class ImageBlock(msgspec.Struct, frozen=True, tag="image", tag_field="type"):
    """Read so that it can be refused by name."""


class DocumentBlock(msgspec.Struct, frozen=True, tag="document", tag_field="type"):
    """Likewise."""


Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock | ImageBlock | DocumentBlock


class Turn(msgspec.Struct, frozen=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolDefinition(msgspec.Struct, frozen=True):
    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    """``custom``, or one of Anthropic's own tools, which are refused."""


class Choice(msgspec.Struct, frozen=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, frozen=True):
    type: str
    budget_tokens: U32 | None = None


class OutputFormat(msgspec.Struct, frozen=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, frozen=True):
    format: OutputFormat | None = None
    effort: str | None = None
    task_budget: Any = None
    """Refused."""


class MessagesBody(msgspec.Struct, frozen=True, kw_only=True):
    model: ShortText
    messages: list[Turn]
    max_tokens: U32 | None = None
    """Required but for counting."""
    system: str | list[TextBlock] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: F32 | None = None
    top_p: F32 | None = None
    top_k: I32 | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    """Its first name, of the beta."""
    metadata: Any = None
    service_tier: str | None = None
    # Refused.
    container: Any = None
    context_management: Any = None
    inference_geo: Any = None
    mcp_servers: Any = None
    speed: str | None = None


# ---------------------------------------------------------------------------------------------------


class MessageUsage(msgspec.Struct):
    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class TextOut(msgspec.Struct, tag="text", tag_field="type"):
    text: str
    citations: None = None


class ThinkingOut(msgspec.Struct, tag="thinking", tag_field="type"):
    thinking: str
    signature: str = ""


class ToolUseOut(msgspec.Struct, tag="tool_use", tag_field="type"):
    id: str
    name: str
    input: Any


BlockOut = TextOut | ThinkingOut | ToolUseOut


class MessageOut(msgspec.Struct):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[BlockOut]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(msgspec.Struct):
    input_tokens: int


class TextDelta(msgspec.Struct, tag="text_delta", tag_field="type"):
    text: str


class ThinkingDelta(msgspec.Struct, tag="thinking_delta", tag_field="type"):
    thinking: str


class InputDelta(msgspec.Struct, tag="input_json_delta", tag_field="type"):
    partial_json: str


class StopDelta(msgspec.Struct):
    stop_reason: str
    stop_sequence: str | None


class StreamEvent(msgspec.Struct):
    """One event of a stream; what it has beside its type depends on that."""

    type: str
    message: MessageOut | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: BlockOut | UnsetType = UNSET
    delta: TextDelta | ThinkingDelta | InputDelta | UnsetType = UNSET


class EndEvent(msgspec.Struct):
    type: Literal["message_delta"]
    delta: StopDelta
    usage: MessageUsage
