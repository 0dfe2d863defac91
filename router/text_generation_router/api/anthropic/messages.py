"""``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from text_generation_router.api.anthropic.schemas import (
    BlockOut,
    EndEvent,
    InputDelta,
    MessageOut,
    MessagesBody,
    MessageUsage,
    StopDelta,
    StreamEvent,
    TextDelta,
    TextOut,
    ThinkingDelta,
    ThinkingOut,
    TokenCount,
    ToolUseOut,
)
from text_generation_router.api.anthropic.translate import chat_of
from text_generation_router.api.body import read_json
from text_generation_router.api.disconnect import until_disconnect
from text_generation_router.api.openai.answering import Answering, Batch, Stream
from text_generation_router.api.openai.answers import Answers, Totals
from text_generation_router.api.openai.chat import Chat, ChatRoutes
from text_generation_router.api.openai.chat_text import ChatText
from text_generation_router.api.reply import JSON, send_body
from text_generation_router.chat.output import CallArguments, CallBegins, Content, Delta, Reasoning
from text_generation_router.errors import RouterError, ValidationError, anthropic_error_body
from text_generation_router.scheduling.requests import Event, PrefillEvent

_messages_body = msgspec.json.Decoder(MessagesBody)
_encode = msgspec.json.Encoder().encode

ROUTE = "messages"
_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}


class MessageRoutes:
    def __init__(self, answers: Answers, chat: ChatRoutes) -> None:
        self._answers = answers
        self._chat = chat

    async def messages(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, _messages_body, self._answers.served.payload_limit)
        answer = self._stream if body.stream else self._whole
        await until_disconnect(receive, answer(scope, send, body))

    async def count_tokens(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, _messages_body, self._answers.served.payload_limit)

        async def count() -> int:
            chat = await self._chat.ask(chat_of(body))
            if chat.request.input_ids is not None:
                return len(chat.request.input_ids)
            return len((await self._answers.tokenizer.encode(chat.request.inputs, add_special_tokens=False)).ids)

        await send_body(send, _encode(TokenCount(await until_disconnect(receive, count()))), JSON)

    async def _ask(self, body: MessagesBody) -> Chat:
        if body.max_tokens is None:
            raise ValidationError("`max_tokens` is required")
        return await self._chat.ask(chat_of(body))

    async def _whole(self, scope: Scope, send: Send, body: MessagesBody) -> None:
        answering = Answering(self._answers, ROUTE, scope, send)
        with answering.counted():
            chat = await self._ask(body)
            text, blocks = chat.new_text(), _Blocks()

            def take(_: int, events: list[Event]) -> None:
                for event in events:
                    if not isinstance(event, PrefillEvent):
                        for part in text.add(event)[0]:
                            blocks.add(part)

            await answering.collect([chat.request], 1, take)
        message = _message(self._answers, usage_of(answering.totals))
        message.content = blocks.finished()
        message.stop_reason, message.stop_sequence = _stop_of(text)
        await answering.send_whole(_encode(message))

    async def _stream(self, scope: Scope, send: Send, body: MessagesBody) -> None:
        answering = Answering(self._answers, ROUTE, scope, send)

        async def ask() -> Stream:
            chat = await self._ask(body)
            frames = _MessageFrames(self._answers, chat, answering)
            return Stream(requests=[chat.request], frames=frames, error_frame=_error_frame)

        await answering.stream(ask)


def _error_frame(error: RouterError) -> bytes:
    return _frame("error", anthropic_error_body(error.status, str(error)))


def usage_of(totals: Totals) -> MessageUsage:
    usage = totals.usage()
    cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(usage.prompt_tokens - cached, usage.completion_tokens, cached)


def _message(answers: Answers, usage: MessageUsage) -> MessageOut:
    return MessageOut(answers.new_id("msg"), "message", "assistant", answers.served.model_id, [], None, None, usage)


def _stop_of(text: ChatText) -> tuple[str, str | None]:
    stop = text.choice.stop_text
    if stop is not None and text.finish_reason == "stop":
        return "stop_sequence", stop
    return _STOP_REASONS[text.finish_reason or "stop"], None


class _Blocks:
    """Parts of an answer as blocks: a new one where the kind changes."""

    def __init__(self) -> None:
        self.blocks: list[BlockOut] = []
        self._inputs: list[str] = []

    def add(self, part: Delta) -> None:
        last = self.blocks[-1] if self.blocks else None
        match part:
            case Content(text):
                if isinstance(last, TextOut):
                    last.text += text
                else:
                    self.blocks.append(TextOut(text))
            case Reasoning(text):
                if isinstance(last, ThinkingOut):
                    last.thinking += text
                else:
                    self.blocks.append(ThinkingOut(text))
            case CallBegins(_, call_id, name):
                self.blocks.append(ToolUseOut(call_id, name, {}))
                self._inputs.append("")
            case CallArguments(index, text):
                self._inputs[index] += text

    def finished(self) -> list[BlockOut]:
        """With the inputs of tools; one that was cut off is empty."""
        calls = [block for block in self.blocks if isinstance(block, ToolUseOut)]
        for call, given in zip(calls, self._inputs, strict=True):
            call.input = _object(given)
        return self.blocks


def _object(text: str) -> Any:
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


class _MessageFrames:
    """Batches of events -> events of Anthropic's stream."""

    def __init__(self, answers: Answers, chat: Chat, answering: Answering) -> None:
        self._answers = answers
        self._answering = answering
        self._text = chat.new_text()
        self._begun = False
        self._index = -1
        self._open: type[object] | None = None
        """The kind of the block that is being written."""

    def __call__(self, batch: Batch) -> tuple[bytes, bool]:
        frames: list[bytes] = []
        if not self._begun:
            self._begun = True
            prompt, cached = self._answering.prompt_tokens
            message = _message(self._answers, MessageUsage(prompt - cached, 0, cached))
            frames.append(_frame("message_start", StreamEvent("message_start", message=message)))
        for event in batch[1]:
            if not isinstance(event, PrefillEvent):
                for part in self._text.add(event)[0]:
                    frames += self._part(part)
        if self._text.finish_reason is None:
            return b"".join(frames), False
        frames += self._close()
        reason, stop = _stop_of(self._text)
        frames.append(
            _frame(
                "message_delta", EndEvent("message_delta", StopDelta(reason, stop), usage_of(self._answering.totals))
            )
        )
        frames.append(_frame("message_stop", StreamEvent("message_stop")))
        return b"".join(frames), True

    def _part(self, part: Delta) -> list[bytes]:
        match part:
            case Content(text):
                return [*self._block(TextOut, TextOut("")), self._delta(TextDelta(text))]
            case Reasoning(text):
                return [*self._block(ThinkingOut, ThinkingOut("")), self._delta(ThinkingDelta(text))]
            case CallBegins(_, call_id, name):
                return [*self._close(), *self._block(ToolUseOut, ToolUseOut(call_id, name, {}))]
            case CallArguments(_, text):
                return [self._delta(InputDelta(text))]

    def _block(self, kind: type[object], block: BlockOut) -> list[bytes]:
        """Begin a block, unless one of its kind is open."""
        if self._open is kind:
            return []
        frames = self._close()
        self._open = kind
        self._index += 1
        event = StreamEvent("content_block_start", index=self._index, content_block=block)
        return [*frames, _frame("content_block_start", event)]

    def _close(self) -> list[bytes]:
        if self._open is None:
            return []
        self._open = None
        return [_frame("content_block_stop", StreamEvent("content_block_stop", index=self._index))]

    def _delta(self, delta: TextDelta | ThinkingDelta | InputDelta) -> bytes:
        return _frame("content_block_delta", StreamEvent("content_block_delta", index=self._index, delta=delta))


def _frame(name: str, payload: object) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + _encode(payload) + b"\n\n"
