"""The routes that generate: ``/generate``, ``/generate_stream`` and ``POST /``."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from msgspec import UNSET
from starlette.types import Receive, Scope, Send

from text_generation_router.api.body import header, read_json
from text_generation_router.api.disconnect import ClientGone, until_disconnect
from text_generation_router.api.reply import send_json
from text_generation_router.api.schemas import (
    BestOfSequence,
    CompatGenerateBody,
    Details,
    GenerateBody,
    GenerateParameters,
    GenerateRequest,
    GenerateResponse,
)
from text_generation_router.api.sse import EventStreamResponse, Headers, error_frame, relay
from text_generation_router.errors import InternalError, RouterError
from text_generation_router.inference import Choice, GenerationResult, Inference
from text_generation_router.metrics import Metrics
from text_generation_router.scheduling.requests import PrefillToken, RequestTimings, Token

logger = logging.getLogger(__name__)

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
        self._compute_type = compute_type.encode("latin-1", "replace")
        self._full_text_by_default = full_text_by_default

    async def generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, _generate_body, self._payload_limit)
        answer = self._answer(scope, send, GenerateRequest(body.inputs, body.parameters), as_list=False)
        await until_disconnect(receive, answer)

    async def generate_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, _generate_body, self._payload_limit)
        answer = self._answer_stream(scope, send, GenerateRequest(body.inputs, body.parameters))
        await until_disconnect(receive, answer)

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
        with _counted(self._metrics):
            result = await self._inference.generate(request, traceparent=_traceparent(scope))
        total_s = time.perf_counter() - started_at
        self._record("generate", request.parameters, result.best, total_s)
        response = to_response(result, request.parameters)
        headers = self._result_headers(result, total_s)
        await send_json(send, _encode([response] if as_list else response), headers=headers)

    async def _answer_stream(self, scope: Scope, send: Send, request: GenerateRequest) -> None:
        """Stream the answer. A failure before the first token is raised, and becomes a response with its status."""
        started_at = time.perf_counter()
        parameters = request.parameters
        response = EventStreamResponse(send, self._stream_headers(request))
        try:
            with _counted(self._metrics):
                async with await self._inference.stream(request, traceparent=_traceparent(scope)) as generation:
                    prefix = generation.inputs if parameters.return_full_text else ""
                    relayed = await relay(generation, response, prefix=prefix, details=parameters.details)
        except RouterError as error:
            if not response.started:
                raise
            await response.end(error_frame(error))
            return
        # The permit is free by now: who asks again on reading the end is not refused for the sake of this request.
        self._record("generate_stream", parameters, relayed, time.perf_counter() - started_at)
        await response.end(relayed.last_frames)

    def _record(self, name: str, parameters: GenerateParameters, answer: HasFinished, total_s: float) -> None:
        """Durations to the metrics, and TGI's one line of log. No text of the client's goes there."""
        finished = answer.finished
        timings = finished.timings
        per_token_s = timings.per_token_s(finished.generated_tokens)
        metrics = self._metrics
        metrics.request_duration.observe(total_s)
        metrics.request_queue_duration.observe(timings.queue_s)
        metrics.request_inference_duration.observe(timings.inference_s)
        metrics.request_mean_time_per_token_duration.observe(per_token_s)
        metrics.request_generated_tokens.observe(finished.generated_tokens)
        if logger.isEnabledFor(logging.INFO):
            span = {
                "name": name,
                "parameters": loggable(parameters),
                "total_time": duration_text(total_s),
                "validation_time": duration_text(timings.validation_s),
                "queue_time": duration_text(timings.queue_s),
                "inference_time": duration_text(timings.inference_s),
                "time_per_token": duration_text(per_token_s),
                "seed": finished.seed,
            }
            logger.info("Success", extra={"span": span})

    def _stream_headers(self, request: GenerateRequest) -> Headers:
        return (
            (b"content-type", b"text/event-stream"),
            (b"cache-control", b"no-cache"),
            (b"x-compute-type", self._compute_type),
            (b"x-compute-characters", b"%d" % len(request.inputs)),
            (b"x-accel-buffering", b"no"),
        )

    def _result_headers(self, result: GenerationResult, total_s: float) -> Headers:
        timings: RequestTimings = result.timings
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
            (b"x-generated-tokens", b"%d" % result.generated_tokens),
        )
