"""One answer of a chat as it grows: tokens -> text -> reasoning, content and calls; streamed or not."""

from __future__ import annotations

from dataclasses import dataclass, field

from text_generation_router.api.openai.choice_text import ChoiceText
from text_generation_router.api.openai.schemas import CalledFunction, ChatMessage, Delta, ToolCallBody
from text_generation_router.chat.output import CallArguments, CallBegins, Content, Reasoning, Stage
from text_generation_router.chat.output import Delta as Part
from text_generation_router.scheduling.requests import TokenEvent


@dataclass(slots=True)
class ChatText:
    """Takes events one by one; ``num_calls`` and ``finish_reason`` are final once the last one was taken."""

    choice: ChoiceText
    stage: Stage
    one_call: bool = False
    """Whether calls behind the first are left out."""
    num_calls: int = 0

    def add(self, event: TokenEvent) -> tuple[list[Part], list[TokenEvent]]:
        """What is new to the client, and the tokens it consists of."""
        piece = self.choice.add(event)
        parts = list(self.stage.feed(piece.text))
        if self.choice.finish_reason is not None:
            parts += self.stage.end()
        if self.one_call:
            parts = [part for part in parts if not (isinstance(part, CallBegins | CallArguments) and part.index > 0)]
        self.num_calls += sum(isinstance(part, CallBegins) for part in parts)
        return parts, piece.tokens

    @property
    def finish_reason(self) -> str | None:
        reason = self.choice.finish_reason
        return "tool_calls" if reason == "stop" and self.num_calls else reason


@dataclass(slots=True)
class WholeMessage:
    """Parts put together."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCallBody] = field(default_factory=list)

    def add(self, parts: list[Part]) -> None:
        for part in parts:
            match part:
                case Content(text):
                    self.content.append(text)
                case Reasoning(text):
                    self.reasoning.append(text)
                case CallBegins(_, call_id, name):
                    self.calls.append(ToolCallBody(CalledFunction("", name), call_id, "function"))
                case CallArguments(index, text):
                    self.calls[index].function.arguments += text

    def body(self) -> ChatMessage:
        text = "".join(self.content)
        message = ChatMessage("assistant", text if text or not self.calls else None)
        if self.reasoning:
            message.reasoning_content = "".join(self.reasoning)
        if self.calls:
            message.tool_calls = self.calls
        return message


def delta_of(part: Part) -> Delta:
    """A part as it is streamed."""
    match part:
        case Content(text):
            return Delta(content=text)
        case Reasoning(text):
            return Delta(reasoning_content=text)
        case CallBegins(index, call_id, name):
            return Delta(tool_calls=[ToolCallBody(CalledFunction("", name), call_id, "function", index)])
        case CallArguments(index, text):
            return Delta(tool_calls=[ToolCallBody(CalledFunction(text), index=index)])
