"""``/v1/completions``: prompts as texts or ids, several of them, several answers to each."""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from starlette.types import Receive, Scope, Send

from text_generation_router.api.body import read_json
from text_generation_router.api.disconnect import until_disconnect
from text_generation_router.api.openai.answering import Answering, Batch, Stream
from text_generation_router.api.openai.answers import DONE, Answers, Totals
from text_generation_router.api.openai.choice_text import ChoiceText
from text_generation_router.api.openai.parameters import completion_parameters, prompts_of
from text_generation_router.api.openai.schemas import (
    Completion,
    CompletionBody,
    CompletionChoice,
    CompletionLogprobs,
)
from text_generation_router.api.schemas import as_f32
from text_generation_router.api.sse import frame
from text_generation_router.errors import ValidationError
from text_generation_router.generate_request import GenerateRequest
from text_generation_router.guidance.formats import response_format
from text_generation_router.scheduling.requests import Event, PrefillEvent, PrefillToken, TokenEvent

_completion_body = msgspec.json.Decoder(CompletionBody)
_encode = msgspec.json.Encoder().encode

_utf_8 = codecs.getincrementaldecoder("utf-8")

ROUTE = "completions"


class CompletionRoutes:
    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    async def completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, _completion_body, self._answers.served.payload_limit)
        answer = self._stream if body.stream else self._whole
        await until_disconnect(receive, answer(scope, send, body))

    async def _whole(self, scope: Scope, send: Send, body: CompletionBody) -> None:
        answering = Answering(self._answers, ROUTE, scope, send)
        with answering.counted():
            requests = self._requests(body)
            num_copies = max(body.n or 1, body.best_of or 1)
            texts = self._texts(body, requests, num_copies)
            await answering.collect(requests, num_copies, lambda index, events: texts[index].take(events))
        kept: list[_Text] = []
        for first in range(0, len(texts), num_copies):
            copies = texts[first : first + num_copies]
            if body.best_of is not None:
                copies.sort(key=_Text.mean_logprob, reverse=True)
            kept += copies[: body.n or 1]
        response = _completion(self._answers, [text.body(index) for index, text in enumerate(kept)])
        response.usage = answering.totals.usage()
        await answering.send_whole(_encode(response))

    async def _stream(self, scope: Scope, send: Send, body: CompletionBody) -> None:
        answering = Answering(self._answers, ROUTE, scope, send)

        async def ask() -> Stream:
            requests = self._requests(body)
            num_copies = body.n or 1
            texts = self._texts(body, requests, num_copies)
            return Stream(
                requests=requests,
                num_copies=num_copies,
                frames=_CompletionFrames(self._answers, body, texts, answering.totals),
                error_frame=self._answers.error_frame,
            )

        await answering.stream(ask, done=DONE)

    def _texts(self, body: CompletionBody, requests: Sequence[GenerateRequest], num_copies: int) -> list[_Text]:
        return [
            _Text(self._answers, body, request, ChoiceText(request.parameters.stop))
            for request in requests
            for _ in range(num_copies)
        ]

    def _requests(self, body: CompletionBody) -> list[GenerateRequest]:
        """One for each prompt. Raises: RouterError."""
        self._answers.served.check_model(body.model)
        parameters, more = completion_parameters(body)
        if parameters.decoder_input_details and not self._answers.prefill_logprobs:
            raise ValidationError(
                "`echo` with `logprobs` asks for the logprobs of the prompt: start the server with "
                "`--enable-prefill-logprobs`, or leave one of them out"
            )
        if body.response_format is not None:
            more = msgspec.structs.replace(more, grammar=response_format(body.response_format))
        prompts = prompts_of(body.prompt, self._answers.max_client_batch_size)
        longest = self._answers.inference.limits.max_input_tokens
        for prompt in prompts:
            if isinstance(prompt, tuple) and len(prompt) > longest:
                raise ValidationError(f"`prompt` must have at most {longest} tokens. Given: {len(prompt)}")
        decode = self._answers.tokenizer.tokenizer.decode
        return [
            GenerateRequest(prompt, parameters, more=more)
            if isinstance(prompt, str)
            else GenerateRequest(
                decode(list(prompt), skip_special_tokens=False), parameters, more=more, input_ids=prompt
            )
            for prompt in prompts
        ]


@dataclass(slots=True)
class _Text:
    """One choice as it grows."""

    answers: Answers
    asked: CompletionBody
    request: GenerateRequest
    choice: ChoiceText
    pieces: list[str] = field(default_factory=list)
    prompt_tokens: list[PrefillToken] = field(default_factory=list)
    tokens: list[TokenEvent] = field(default_factory=list)
    """Those whose logprobs are reported."""
    begun: bool = False
    num_shown: int = 0
    """Characters before the next token: prompts count where they are echoed."""
    _logprobs: list[float] = field(default_factory=list)
    _characters: codecs.IncrementalDecoder = field(default_factory=lambda: _utf_8(errors="replace"))
    """A character may be several tokens: it counts with the last of them."""

    def take(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, PrefillEvent):
                self.prompt_tokens = event.tokens
                continue
            self._logprobs.append(event.token.logprob or 0.0)
            piece = self.choice.add(event)
            self.pieces.append(piece.text)
            self.tokens += piece.tokens

    def mean_logprob(self) -> float:
        return sum(self._logprobs) / max(len(self._logprobs), 1)

    def flush(self) -> tuple[str, CompletionLogprobs | None]:
        """What was taken since the last time, the echo of the prompt ahead of it."""
        text = "".join(self.pieces)
        echo = self.request.inputs if self.asked.echo and not self.begun else ""
        logprobs = self._logprob_lists() if self.asked.logprobs is not None else None
        self.begun = True
        self.num_shown += len(echo) + len(text) if logprobs is None else 0
        self.pieces, self.tokens, self.prompt_tokens = [], [], []
        return echo + text, logprobs

    def body(self, index: int) -> CompletionChoice:
        text, logprobs = self.flush()
        return CompletionChoice(index, text, logprobs, self.choice.finish_reason)

    def _logprob_lists(self) -> CompletionLogprobs:
        text_of = self.answers.texts.of
        wants_top = bool(self.asked.logprobs)
        lists = CompletionLogprobs([], [], [] if wants_top else None, [])
        prompt = [(token.id, token.logprob, token.top or None) for token in self.prompt_tokens if self.asked.echo]
        output = [
            (event.token.id, event.token.logprob, [(top.id, top.logprob) for top in event.top_tokens or ()])
            for event in self.tokens
        ]
        for token_id, logprob, top in [*prompt, *output]:
            raw = text_of(token_id)
            lists.tokens.append(_shown(raw))
            lists.token_logprobs.append(as_f32(logprob))
            if lists.top_logprobs is not None:
                # Of a prompt's first token nothing is known.
                tops = None if top is None else {_shown(text_of(top_id)): as_f32(p) for top_id, p in top}
                lists.top_logprobs.append(tops)
            lists.text_offset.append(self.num_shown)
            if not self._is_hidden(token_id, _shown(raw)):
                self.num_shown += len(self._characters.decode(raw))
        return lists

    def _is_hidden(self, token_id: int, spelling: str) -> bool:
        """Whether a token is special and not in the text: nobody wrote it into the prompt that is echoed."""
        echo = self.request.inputs if self.asked.echo else ""
        is_special = token_id in self.answers.tokenizer.special_ids
        return is_special and not echo.startswith(spelling, self.num_shown)


def _shown(raw: bytes) -> str:
    return raw.decode(errors="replace")


def _completion(answers: Answers, choices: list[CompletionChoice]) -> Completion:
    return Completion(
        id=answers.new_id("cmpl"),
        object="text_completion",
        created=int(time.time()),
        model=answers.served.model_id,
        system_fingerprint=answers.fingerprint,
        choices=choices,
    )


class _CompletionFrames:
    """Batches of events -> chunks of the stream."""

    def __init__(self, answers: Answers, body: CompletionBody, texts: list[_Text], totals: Totals) -> None:
        self._texts = texts
        self._totals = totals
        self._num_left = len(texts)
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._chunk = _completion(answers, [])
        if self._include_usage:
            self._chunk.usage = None

    def __call__(self, batch: Batch) -> tuple[bytes, bool]:
        """The chunks of a batch, and whether it was the last."""
        index, events = batch
        text = self._texts[index]
        frames: list[bytes] = []
        for event in events:
            is_first = not text.begun
            text.take([event])
            ended = text.choice.finish_reason is not None
            if any(text.pieces) or (is_first and text.asked.echo) or ended:
                self._chunk.choices = [text.body(index)]
                frames.append(frame(self._chunk))
            self._num_left -= ended
        all_ended = self._num_left == 0
        if all_ended and self._include_usage:
            frames.append(frame(msgspec.structs.replace(self._chunk, choices=[], usage=self._totals.usage())))
        return b"".join(frames), all_ended
