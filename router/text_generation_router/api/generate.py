"""The routes that generate: ``/generate``, ``/generate_stream`` and ``POST /``."""

from __future__ import annotations

import time

import msgspec
from msgspec import UNSET, UnsetType
from starlette.types import Receive, Scope, Send

from text_generation_router.api.accounting import counted, record_success
from text_generation_router.api.body import read_json
from text_generation_router.api.caller import caller_of
from text_generation_router.api.disconnect import until_disconnect
from text_generation_router.api.headers import header_value, result_headers, stream_headers
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
from text_generation_router.api.sse import EventStreamResponse, NativeFrames, error_frame, relay
from text_generation_router.errors import RouterError
from text_generation_router.generate_request import GenerateParameters, GenerateRequest
from text_generation_router.inference import Choice, GenerationResult, Inference
from text_generation_router.metrics import Metrics

_generate_body = msgspec.json.Decoder(GenerateBody)
_compat_body = msgspec.json.Decoder(CompatGenerateBody)
_encode = msgspec.json.Encoder().encode


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
        self._compute_type = header_value(compute_type)
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
        headers = result_headers(
            self._compute_type,
            len(result.inputs),
            result.best.finished,
            prompt_tokens=result.prompt_tokens,
            cached_tokens=result.best.finished.cached_tokens,
            total_s=total_s,
        )
        await send_body(send, _encode([response] if as_list else response), JSON, headers=headers)

    async def _answer_stream(self, scope: Scope, send: Send, request: GenerateRequest) -> None:
        """Stream the answer. A failure before the first token is raised, and becomes a response with its status."""
        started_at = time.perf_counter()
        parameters = request.parameters
        response = EventStreamResponse(scope, send, stream_headers(self._compute_type, len(request.inputs)))
        try:
            with counted(self._metrics, "generate_stream"):
                async with await self._inference.stream(request, caller_of(scope)) as generation:
                    prefix = generation.inputs if parameters.return_full_text else ""
                    frames = NativeFrames(prefix, details=parameters.details)
                    last_frames = await relay(generation.next_events, frames, response)
        except RouterError as error:
            if not response.started:
                raise
            await response.end(error_frame(error))
            return
        total_s = time.perf_counter() - started_at
        assert frames.finished is not None, "the last event is handed out"
        record_success(self._metrics, "generate_stream", parameters, frames.finished, total_s)
        # The permit is free by now: a client that asks again on reading the end is not refused on its own account.
        await response.end(last_frames)


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
