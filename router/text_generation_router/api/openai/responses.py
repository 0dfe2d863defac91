"""``/v1/responses``: the stateless core of OpenAI's newer API, as a translation onto the chat route."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from text_generation_router.api.body import read_json
from text_generation_router.api.disconnect import until_disconnect
from text_generation_router.api.openai.answering import Answering, Batch, Stream
from text_generation_router.api.openai.answers import Answers, Totals
from text_generation_router.api.openai.chat import Chat, ChatRoutes
from text_generation_router.api.openai.responses_input import ResponsesBody, chat_of
from text_generation_router.chat.output import CallArguments, CallBegins, Content, Delta, Reasoning
from text_generation_router.errors import RouterError
from text_generation_router.scheduling.requests import Event, PrefillEvent, TokenEvent

_responses_body = msgspec.json.Decoder(ResponsesBody)
_encode = msgspec.json.Encoder().encode

ROUTE = "responses"
Json = dict[str, Any]


class ResponseRoutes:
    def __init__(self, answers: Answers, chat: ChatRoutes) -> None:
        self._answers = answers
        self._chat = chat

    async def responses(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, _responses_body, self._answers.served.payload_limit)
        answer = self._stream if body.stream else self._whole
        await until_disconnect(receive, answer(scope, send, body))

    async def _whole(self, scope: Scope, send: Send, body: ResponsesBody) -> None:
        answering = Answering(self._answers, ROUTE, scope, send)
        with answering.counted():
            chat = await self._chat.ask(chat_of(body))
            events = ResponseEvents(self._answers, body, chat, answering.totals)
            await answering.collect([chat.request], 1, lambda _, batch: events.take(batch))
        await answering.send_whole(_encode(events.response))

    async def _stream(self, scope: Scope, send: Send, body: ResponsesBody) -> None:
        answering = Answering(self._answers, ROUTE, scope, send)

        async def ask() -> Stream:
            chat = await self._chat.ask(chat_of(body))
            events = ResponseEvents(self._answers, body, chat, answering.totals)
            return Stream(requests=[chat.request], frames=events.frames, error_frame=events.failure)

        await answering.stream(ask)


class ResponseEvents:
    """Builds a response as it comes, and says each change of it as an event."""

    def __init__(self, answers: Answers, body: ResponsesBody, chat: Chat, totals: Totals) -> None:
        self.response = _response(answers, body)
        self._answers = answers
        self._totals = totals
        self._text = chat.new_text()
        self._number = 0
        self._begun = False
        self._item: Json | None = None
        """The one that is being written: the last of the output."""
        self._num_reasoning = 0

    def frames(self, batch: Batch) -> tuple[bytes, bool]:
        """For `Stream`."""
        events = self.take(batch[1])
        return b"".join(_frame(event) for event in events), self.response["status"] != "in_progress"

    def failure(self, error: RouterError) -> bytes:
        said = {"code": error.error_type, "message": str(error)}
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": str(error)}}
        events = [self._event("error", param=None, **said), self._event("response.failed", response=self.response)]
        return b"".join(_frame(event) for event in events)

    def take(self, events: list[Event]) -> list[Json]:
        said: list[Json] = []
        if not self._begun:
            self._begun = True
            said += [self._event(f"response.{name}", response=self.response) for name in ("created", "in_progress")]
        for event in events:
            if not isinstance(event, PrefillEvent):
                said += self._take_token(event)
        return said

    def _take_token(self, event: TokenEvent) -> list[Json]:
        parts, _ = self._text.add(event)
        self._num_reasoning += bool(parts) and all(isinstance(part, Reasoning) for part in parts)
        said = [each for part in parts for each in self._part(part)]
        reason = self._text.finish_reason
        if reason is None:
            return said
        complete = reason != "length"
        said += self._close("completed" if complete else "incomplete")
        status = "completed" if complete else "incomplete"
        self.response |= {
            "status": status,
            "incomplete_details": None if complete else {"reason": "max_output_tokens"},
            "usage": self._usage(),
        }
        return [*said, self._event(f"response.{status}", response=self.response)]

    def _part(self, part: Delta) -> list[Json]:
        match part:
            case Content(text):
                return [*self._text_item("message"), self._grow("output_text", "text", text)]
            case Reasoning(text):
                return [*self._text_item("reasoning"), self._grow("reasoning_text", "text", text)]
            case CallBegins(_, call_id, name):
                item = {
                    "type": "function_call",
                    "id": self._answers.new_id("fc"),
                    "call_id": call_id,
                    "name": name,
                    "arguments": "",
                    "status": "in_progress",
                }
                return [*self._close("completed"), *self._open(item)]
            case CallArguments(_, text):
                assert self._item is not None
                self._item["arguments"] += text
                return [self._item_event("response.function_call_arguments.delta", delta=text)]

    def _text_item(self, kind: str) -> list[Json]:
        """Open an item of the kind, unless it is open."""
        if self._item is not None and self._item["type"] == kind:
            return []
        said = self._close("completed")
        if kind == "message":
            item: Json = {"type": kind, "id": self._answers.new_id("msg"), "role": "assistant", "status": "in_progress"}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"type": kind, "id": self._answers.new_id("rs"), "summary": [], "status": "in_progress"}
            part = {"type": "reasoning_text", "text": ""}
        said += self._open(item | {"content": []})
        assert self._item is not None
        self._item["content"].append(part)
        said.append(self._item_event("response.content_part.added", content_index=0, part=dict(part)))
        return said

    def _grow(self, kind: str, member: str, text: str) -> Json:
        assert self._item is not None
        self._item["content"][0][member] += text
        more: Json = {"logprobs": []} if kind == "output_text" else {}
        return self._item_event(f"response.{kind}.delta", content_index=0, delta=text, **more)

    def _open(self, item: Json) -> list[Json]:
        self._item = item
        self.response["output"].append(item)
        # A copy: it is sent when it has grown already.
        shown = {**item, "content": []} if "content" in item else dict(item)
        return [self._event("response.output_item.added", output_index=self._index, item=shown)]

    def _close(self, status: str) -> list[Json]:
        item = self._item
        if item is None:
            return []
        said: list[Json] = []
        if item["type"] == "function_call":
            said.append(
                self._item_event(
                    "response.function_call_arguments.done", arguments=item["arguments"], name=item["name"]
                )
            )
        else:
            part = item["content"][0]
            more: Json = {"logprobs": []} if part["type"] == "output_text" else {}
            said.append(self._item_event(f"response.{part['type']}.done", content_index=0, text=part["text"], **more))
            said.append(self._item_event("response.content_part.done", content_index=0, part=part))
        item["status"] = status
        said.append(self._event("response.output_item.done", output_index=self._index, item=item))
        self._item = None
        return said

    @property
    def _index(self) -> int:
        return len(self.response["output"]) - 1

    def _item_event(self, kind: str, **members: Any) -> Json:
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=self._index, **members)

    def _event(self, kind: str, **members: Any) -> Json:
        self._number += 1
        response = members.get("response")
        if response is not None:
            members["response"] = {**response, "output": list(response["output"])}
        return {"type": kind, "sequence_number": self._number - 1, **members}

    def _usage(self) -> Json:
        usage = self._totals.usage()
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning},
            "total_tokens": usage.total_tokens,
        }


def _response(answers: Answers, body: ResponsesBody) -> Json:
    form = body.text.format if body.text is not None else None
    return {
        "id": answers.new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": answers.served.model_id,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"} if form is None else form},
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": body.tools or [],
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _frame(event: Json) -> bytes:
    return b"event: " + str(event["type"]).encode() + b"\ndata: " + _encode(event) + b"\n\n"
