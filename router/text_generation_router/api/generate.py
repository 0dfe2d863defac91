"""The routes that generate: ``/generate``, ``/generate_stream`` and ``POST /``."""

from __future__ import annotations

import hashlib
import re
import time

import msgspec
from msgspec import UNSET, UnsetType
from starlette.types import Receive, Scope, Send

from text_generation_router.api.accounting import counted, record_success
from text_generation_router.api.body import header, read_json
from text_generation_router.api.disconnect import until_disconnect
from text_generation_router.api.reply import JSON, send_body
from text_generation_router.api.schemas import (
    BestOfSequence,
    CompatGenerateBody,
    Details,
    GenerateBody,
    GenerateResponse,
    PrefillTokenBody,
    TokenBody,
    as_f32,
    token_body,
)
from text_generation_router.api.sse import EventStreamResponse, Headers, error_frame, relay
from text_generation_router.errors import RouterError
from text_generation_router.generate_request import Caller, GenerateParameters, GenerateRequest
from text_generation_router.inference import Choice, GenerationResult, Inference
from text_generation_router.metrics import Metrics

_generate_body = msgspec.json.Decoder(GenerateBody)
_compat_body = msgspec.json.Decoder(CompatGenerateBody)
_encode = msgspec.json.Encoder().encode
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class GenerateRoutes:
    """Handlers in raw ASGI: a token of a stream passes through no response object."""

    def __init__(
        self,
        inference: Inference,
        metrics: Metrics,
        *,
        payload_limit: int,
        compute_type: str,
        full_text_by_default: bool,
    ) -> None:
        """``full_text_by_default``: whether ``POST /`` prefixes the prompt when a request does not say."""
        self._inference = inference
        self._metrics = metrics
        self._payload_limit = payload_limit
        # A header value: a line break in it would break every answer.
        self._compute_type = re.sub(r"[^ -~]", "?", compute_type).encode()
        self._full_text_by_default = full_text_by_default

    async def generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, _generate_body, self._payload_limit)
        request = GenerateRequest(body.inputs, body.parameters)
        await until_disconnect(receive, self._answer(scope, send, request, as_list=False))

    async def generate_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, _generate_body, self._payload_limit)
        request = GenerateRequest(body.inputs, body.parameters)
        await until_disconnect(receive, self._answer_stream(scope, send, request))

    async def compat_generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /``: a list with one answer, or a stream."""
        body = await read_json(scope, receive, _compat_body, self._payload_limit)
        parameters = body.parameters
        if parameters.return_full_text is None:
            parameters = msgspec.structs.replace(parameters, return_full_text=self._full_text_by_default)
        request = GenerateRequest(body.inputs, parameters)
        if body.stream:
            await until_disconnect(receive, self._answer_stream(scope, send, request))
        else:
            await until_disconnect(receive, self._answer(scope, send, request, as_list=True))

    async def _answer(self, scope: Scope, send: Send, request: GenerateRequest, *, as_list: bool) -> None:
        started_at = time.perf_counter()
        with counted(self._metrics, "generate"):
            result = await self._inference.generate(request, caller_of(scope))
        total_s = time.perf_counter() - started_at
        record_success(self._metrics, "generate", request.parameters, result.best.finished, total_s)
        response = to_response(result, request.parameters)
        headers = self._result_headers(result, total_s)
        await send_body(send, _encode([response] if as_list else response), JSON, headers=headers)

    async def _answer_stream(self, scope: Scope, send: Send, request: GenerateRequest) -> None:
        """Stream the answer. A failure before the first token is raised, and becomes a response with its status."""
        started_at = time.perf_counter()
        parameters = request.parameters
        response = EventStreamResponse(scope, send, self._stream_headers(request))
        try:
            with counted(self._metrics, "generate_stream"):
                async with await self._inference.stream(request, caller_of(scope)) as generation:
                    prefix = generation.inputs if parameters.return_full_text else ""
                    relayed = await relay(generation, response, prefix=prefix, details=parameters.details)
        except RouterError as error:
            if not response.started:
                raise
            await response.end(error_frame(error))
            return
        total_s = time.perf_counter() - started_at
        record_success(self._metrics, "generate_stream", parameters, relayed.finished, total_s)
        # The permit is free by now: a client that asks again on reading the end is not refused on its own account.
        await response.end(relayed.last_frames)

    def _stream_headers(self, request: GenerateRequest) -> Headers:
        return (
            (b"content-type", b"text/event-stream"),
            (b"cache-control", b"no-cache"),
            (b"x-compute-type", self._compute_type),
            (b"x-compute-characters", b"%d" % len(request.inputs)),
            (b"x-accel-buffering", b"no"),
        )

    def _result_headers(self, result: GenerationResult, total_s: float) -> Headers:
        timings = result.timings
        per_token_s = timings.per_token_s(result.best.finished.generated_tokens)
        return (
            (b"x-compute-type", self._compute_type),
            (b"x-compute-time", repr(total_s).encode()),
            (b"x-compute-characters", b"%d" % len(result.inputs)),
            (b"x-total-time", _milliseconds(total_s)),
            (b"x-validation-time", _milliseconds(timings.validation_s)),
            (b"x-queue-time", _milliseconds(timings.queue_s)),
            (b"x-inference-time", _milliseconds(timings.inference_s)),
            (b"x-time-per-token", _milliseconds(per_token_s)),
            (b"x-prompt-tokens", b"%d" % result.prompt_tokens),
            (b"x-cached-tokens", b"%d" % result.best.finished.cached_tokens),
            (b"x-generated-tokens", b"%d" % result.generated_tokens),
        )


def to_response(result: GenerationResult, parameters: GenerateParameters) -> GenerateResponse:
    """The body of an answer, with as much detail as was asked for."""
    prefix = result.inputs if parameters.return_full_text else ""
    best = result.best
    finished = best.finished
    response = GenerateResponse(prefix + finished.generated_text)
    if parameters.details or parameters.decoder_input_details:
        response.details = Details(
            finish_reason=finished.finish_reason.value,
            generated_tokens=finished.generated_tokens,
            seed=finished.seed,
            prefill=_prefill(best),
            tokens=[token_body(token) for token in best.tokens],
            best_of_sequences=[_sequence(choice, prefix) for choice in result.others] or UNSET,
            top_tokens=_top_tokens(best),
        )
    return response


def _sequence(choice: Choice, prefix: str) -> BestOfSequence:
    finished = choice.finished
    return BestOfSequence(
        generated_text=prefix + finished.generated_text,
        finish_reason=finished.finish_reason.value,
        generated_tokens=finished.generated_tokens,
        seed=finished.seed,
        prefill=_prefill(choice),
        tokens=[token_body(token) for token in choice.tokens],
        top_tokens=_top_tokens(choice),
    )


def _prefill(choice: Choice) -> list[PrefillTokenBody]:
    return [PrefillTokenBody(token.id, token.text, as_f32(token.logprob)) for token in choice.prefill]


def _top_tokens(choice: Choice) -> list[list[TokenBody]] | UnsetType:
    return [[token_body(token) for token in tokens] for tokens in choice.top_tokens] or UNSET


def caller_of(scope: Scope) -> Caller:
    """Who sent a request. A malformed trace context is nobody's error and counts as none."""
    trace = header(scope, b"traceparent")
    key = header(scope, b"authorization")
    return Caller(
        traceparent=trace.decode("ascii") if trace is not None and _TRACEPARENT.fullmatch(trace) else "",
        # Also where no key is asked for: a gateway in front may know its tenants by theirs.
        cache_salt=b"" if key is None else hashlib.sha256(key).digest(),
    )


def _milliseconds(seconds: float) -> bytes:
    return b"%d" % (seconds * 1e3)
