"""``/v1/chat/completions`` and TGI's ``/chat_tokenize``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from msgspec import UNSET
from starlette.types import Receive, Scope, Send

from text_generation_router.api.body import decode, read_json
from text_generation_router.api.disconnect import until_disconnect
from text_generation_router.api.openai.answering import Answering, Batch, Stream
from text_generation_router.api.openai.answers import DONE, Answers, Totals, logprob_bodies
from text_generation_router.api.openai.chat_text import ChatText, WholeMessage, delta_of
from text_generation_router.api.openai.choice_text import ChoiceText
from text_generation_router.api.openai.parameters import chat_parameters
from text_generation_router.api.openai.schemas import (
    CalledFunction,
    ChatBody,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatTokenized,
    ChunkChoice,
    Delta,
    TgiDelta,
    ToolCallBody,
)
from text_generation_router.api.reply import JSON, send_body
from text_generation_router.api.service import simple_tokens
from text_generation_router.api.sse import frame
from text_generation_router.chat.messages import template_messages
from text_generation_router.chat.output import (
    CallArguments,
    CallBegins,
    Content,
    Plain,
    Reasoning,
    ReasoningStage,
    Stage,
    counted_id,
)
from text_generation_router.chat.output import Delta as Part
from text_generation_router.chat.plain_text import Piece, PlainText, pieces_of
from text_generation_router.chat.reasoning import REASONING_MARKS, ReasoningMarks
from text_generation_router.chat.template import ChatTemplates
from text_generation_router.chat.tools import (
    ToolFormat,
    Tools,
    forced_grammar,
    format_of,
    tool_text,
    tools_of,
    written_form,
)
from text_generation_router.errors import TemplateFailed, ToolError, ValidationError
from text_generation_router.generate_request import GenerateRequest
from text_generation_router.guidance.formats import response_format
from text_generation_router.scheduling.requests import Event, PrefillEvent, TokenEvent

_chat_body = msgspec.json.Decoder(ChatBody)
_encode = msgspec.json.Encoder().encode

ROUTE = "chat_completions"
NO_TEMPLATE = (
    "template not found: the model has no chat template. Give one with `--tokenizer-config-path`, or use "
    "`/v1/completions`"
)


class ChatRoutes:
    def __init__(
        self,
        answers: Answers,
        templates: ChatTemplates | None,
        *,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
        plain_text: PlainText | None = None,
    ) -> None:
        """``tool_call_parser``: one of `tools.FORMATS` by name, if it is not to be the template's. ``plain_text``: what
        is special stays text in messages."""
        self._answers = answers
        self._templates = templates
        self._form = format_of(templates.tool_use.source if templates else "", tool_call_parser)
        self._plain_text = plain_text
        self._reasoning = None if reasoning_parser is None else REASONING_MARKS[reasoning_parser]

    async def completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, _chat_body, self._answers.served.payload_limit)
        answer = self._stream if body.stream else self._whole
        await until_disconnect(receive, answer(scope, send, body))

    async def tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes no permit, as `/tokenize`."""
        body = await read_json(scope, receive, _chat_body, self._answers.served.payload_limit)

        async def answer() -> bytes:
            tools = tools_of(body.tools, body.tool_choice or None, parallel=body.parallel_tool_calls)
            pieces = await self._render(body, tools)
            text = "".join(piece for piece, _ in pieces)
            if len(pieces) > 1:
                encoding = await self._answers.tokenizer.encode_pieces(pieces)
                return _encode(ChatTokenized(simple_tokens(text, encoding), text))
            return await self._answers.tokenizer.encode_then(
                text,
                lambda encoding: _encode(ChatTokenized(simple_tokens(text, encoding), text)),
                add_special_tokens=False,
            )

        await send_body(send, await until_disconnect(receive, answer()), JSON)

    async def request_of(self, body: bytes) -> GenerateRequest:
        """What the body of a chat asks of the model, where the answer is one text. Raises: BodyError, RouterError."""
        chat = await decode(body, _chat_body)
        if chat.stream or chat.logprobs or chat.n not in (None, 1):
            raise ValidationError("the answer is one text here: `stream`, `logprobs` and `n` > 1 are not supported")
        return (await self.ask(chat)).request

    async def _whole(self, scope: Scope, send: Send, body: ChatBody) -> None:
        answers = self._answers
        answering = Answering(answers, ROUTE, scope, send)
        with answering.counted():
            chat = await self.ask(body)
            texts = [chat.new_text() for _ in range(chat.num_choices)]
            messages = [WholeMessage() for _ in texts]
            tokens: list[list[TokenEvent]] = [[] for _ in texts]

            def take(index: int, events: list[Event]) -> None:
                for event in events:
                    if not isinstance(event, PrefillEvent):
                        parts, new = texts[index].add(event)
                        messages[index].add(parts)
                        tokens[index] += new

            await answering.collect([chat.request], chat.num_choices, take)
        choices = [
            ChatChoice(
                index=index,
                message=messages[index].body(),
                logprobs=ChatLogprobs(logprob_bodies(tokens[index], answers.texts)) if body.logprobs else None,
                finish_reason=text.finish_reason or "stop",
            )
            for index, text in enumerate(texts)
        ]
        response = ChatCompletion(
            id=answers.new_id("chatcmpl"),
            object="chat.completion",
            created=int(time.time()),
            model=answers.served.model_id,
            system_fingerprint=answers.fingerprint,
            choices=choices,
            usage=answering.totals.usage(),
        )
        await answering.send_whole(_encode(response))

    async def _stream(self, scope: Scope, send: Send, body: ChatBody) -> None:
        answering = Answering(self._answers, ROUTE, scope, send)

        async def ask() -> Stream:
            chat = await self.ask(body)
            return Stream(
                requests=[chat.request],
                num_copies=chat.num_choices,
                frames=_ChatFrames(self._answers, body, chat, answering.totals),
                error_frame=self._answers.error_frame,
            )

        # TGI's client takes everything for JSON.
        await answering.stream(ask, done=b"" if body.is_of_tgis_client else DONE)

    async def ask(self, body: ChatBody) -> Chat:
        """What the model is asked, and how its answer is read. Raises: RouterError."""
        self._answers.served.check_model(body.model)
        parameters, more = chat_parameters(body)
        tools = tools_of(body.tools, body.tool_choice or None, parallel=body.parallel_tool_calls)
        grammar = None if body.response_format is None else response_format(body.response_format)
        if tools is not None and grammar is not None:
            raise ToolError("Grammar and tools are mutually exclusive")
        form = None if tools is None else written_form(tools, self._form)
        if tools is not None and form is not None and tools.forced:
            grammar = forced_grammar(tools, form, self._answers.texts.special_id)
        pieces = await self._render(body, tools)
        ids = None
        if len(pieces) > 1:
            ids = tuple((await self._answers.tokenizer.encode_pieces(pieces)).ids)
        request = GenerateRequest(
            "".join(text for text, _ in pieces),
            parameters,
            add_special_tokens=False,
            more=msgspec.structs.replace(more, grammar=grammar),
            input_ids=ids,
        )
        return Chat(request, body.n or 1, tools, form, self._reasoning, is_tgis=body.is_of_tgis_client)

    async def _render(self, body: ChatBody, tools: Tools | None) -> list[Piece]:
        """The prompt; in one piece, but where special tokens are to stay text."""
        if self._templates is None:
            raise TemplateFailed(NO_TEMPLATE)
        template = self._templates.default if tools is None else self._templates.tool_use
        options = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            options["reasoning_effort"] = body.reasoning_effort
        for name, value in options.items():
            if isinstance(value, dict | list):
                raise ValidationError(f"`chat_template_kwargs` takes texts, numbers and booleans, `{name}` is none")
            if name not in template.options:
                known = ", ".join(f"`{option}`" for option in sorted(template.options)) or "none"
                raise ValidationError(f"the chat template does not read `{name}`; what it reads: {known}")
        messages = template_messages(body.messages, knows_developer="developer" in template.source)
        known_tools: list[dict[str, Any]] | None = None
        if tools is not None and template.knows_tools:
            known_tools = [tool.for_template() for tool in tools.tools]
        elif tools is not None:
            if not messages:
                raise ValidationError("`messages` must not be empty")
            messages[-1]["content"] += tool_text(tools, body.tool_prompt)
        hidden: list[str] = []
        if self._plain_text is not None:
            messages, known_tools = self._plain_text.hide([messages, known_tools], hidden)
        prompt = await template.render(messages, tools=known_tools, options=options)
        return pieces_of(prompt, hidden) if hidden else [(prompt, False)]


@dataclass(frozen=True, slots=True)
class Chat:
    """A request for the model, and how its answers are read."""

    request: GenerateRequest
    num_choices: int
    tools: Tools | None
    form: ToolFormat | None
    """How calls of ``tools`` are written."""
    reasoning: ReasoningMarks | None
    is_tgis: bool
    """Sent by TGI's own client, which counts calls, and reads streams of a form of its own."""

    def new_text(self) -> ChatText:
        """The text of one of the answers."""
        stage: Stage = Plain()
        marks: tuple[str, ...] = ()
        if self.tools is not None and self.form is not None:
            stage = self.form.stage(self.tools, counted_id if self.is_tgis else self.form.new_id)
            marks = self.form.all_marks
        # What obeys a grammar has no room for a thought, whatever the prompt has begun.
        if self.reasoning is not None and self.request.more.grammar is None:
            begin, end = self.reasoning
            inside = self.request.inputs.rstrip().endswith(begin)
            stage, marks = ReasoningStage(begin, end, stage, inside), (*marks, begin, end)
        one_call = self.tools is not None and not self.tools.parallel
        return ChatText(ChoiceText(self.request.parameters.stop, marks), stage, one_call=one_call)


class _ChatFrames:
    """Batches of events -> chunks of the stream."""

    def __init__(self, answers: Answers, body: ChatBody, chat: Chat, totals: Totals) -> None:
        self._answers = answers
        self._totals = totals
        self._texts = [chat.new_text() for _ in range(chat.num_choices)]
        self._begun = [False] * chat.num_choices
        self._is_null = [chat.tools is not None and not chat.is_tgis] * chat.num_choices
        """Whether the content is null as far as it was sent: that of a whole answer is, where there are only calls."""
        self._num_left = chat.num_choices
        self._with_logprobs = bool(body.logprobs)
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._is_tgis = chat.is_tgis
        self._call_ids: dict[int, str] = {}
        self._chunk = ChatChunk(
            id=answers.new_id("chatcmpl"),
            object="chat.completion.chunk",
            created=int(time.time()),
            model=answers.served.model_id,
            system_fingerprint=answers.fingerprint,
            choices=[],
            usage=None if self._include_usage else UNSET,
        )

    def __call__(self, batch: Batch) -> tuple[bytes, bool]:
        """The chunks of a batch, and whether it was the last."""
        index, events = batch
        frames: list[bytes] = []
        for event in events:
            if not isinstance(event, PrefillEvent):
                frames += self._frames(index, event)
        if self._texts[index].finish_reason is not None:
            self._num_left -= 1
        ended = self._num_left == 0
        if ended and self._include_usage:
            frames.append(frame(msgspec.structs.replace(self._chunk, choices=[], usage=self._totals.usage())))
        return b"".join(frames), ended

    def _frames(self, index: int, event: TokenEvent) -> list[bytes]:
        frames: list[bytes] = []
        text = self._texts[index]
        parts, tokens = text.add(event)
        deltas = [self._tgi_delta(part) if self._is_tgis else delta_of(part) for part in parts]
        if not self._begun[index] and not self._is_tgis:  # which wants the role in every chunk
            frames.append(self._frame(index, Delta("assistant", None if self._is_null[index] else "")))
        self._begun[index] = True
        if any(isinstance(part, Content) for part in parts):
            self._is_null[index] = False
        if self._is_null[index] and text.finish_reason is not None and not text.num_calls:
            deltas.append(Delta(content=""))
        logprobs = None
        if self._with_logprobs and tokens:
            logprobs = ChatLogprobs(logprob_bodies(tokens, self._answers.texts))
        if not deltas and (logprobs is not None or text.finish_reason is not None):
            deltas.append(TgiDelta("") if self._is_tgis else Delta())
        for place, delta in enumerate(deltas):
            last = place == len(deltas) - 1
            frames.append(
                self._frame(index, delta, logprobs if place == 0 else None, text.finish_reason if last else None)
            )
        return frames

    def _tgi_delta(self, part: Part) -> TgiDelta:
        match part:
            case CallBegins(index, call_id, name):
                self._call_ids[index] = call_id
                return TgiDelta(tool_calls=ToolCallBody(CalledFunction("", name), call_id, "function", index))
            case CallArguments(index, text):
                call = ToolCallBody(CalledFunction(text, None), self._call_ids[index], "function", index)
                return TgiDelta(tool_calls=call)
            case Content(text) | Reasoning(text):
                return TgiDelta(text)

    def _frame(
        self,
        index: int,
        delta: Delta | TgiDelta,
        logprobs: ChatLogprobs | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        self._chunk.choices = [ChunkChoice(index, cast("Delta", delta), logprobs, finish_reason)]
        return frame(self._chunk)
