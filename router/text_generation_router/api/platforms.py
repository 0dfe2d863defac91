"""Paths that take bodies of several routes: ``POST /``, SageMaker's ``/invocations``, Vertex AI's ``/vertex``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope, Send

from text_generation_router.api.accounting import counted, record_success
from text_generation_router.api.body import decode, read_json
from text_generation_router.api.caller import caller_of
from text_generation_router.api.disconnect import until_disconnect
from text_generation_router.api.edge import Handler
from text_generation_router.api.openai.chat import ChatRoutes
from text_generation_router.api.reply import JSON, send_body
from text_generation_router.errors import ValidationError, WrongJson, first_of
from text_generation_router.generate_request import GenerateParameters, GenerateRequest
from text_generation_router.inference import GenerationResult, Inference
from text_generation_router.metrics import Metrics

_raw_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_encode = msgspec.json.Encoder().encode


class VertexBody(msgspec.Struct, frozen=True):
    instances: list[msgspec.Raw]


class VertexInstance(msgspec.Struct, frozen=True):
    inputs: str
    parameters: GenerateParameters | None = None


class VertexRequest(msgspec.Struct, frozen=True):
    """The same to be shown: an instance may also be a chat."""

    instances: list[dict[str, Any]]


class VertexAnswer(msgspec.Struct):
    predictions: list[str]


_vertex_body = msgspec.json.Decoder(VertexBody)
_vertex_instance = msgspec.json.Decoder(VertexInstance)


class SharedPaths:
    """What a body asks for, its members say."""

    def __init__(
        self, *, inputs: Handler, texts: Handler | None, others: Mapping[str, Handler], payload_limit: int
    ) -> None:
        """``inputs``: of a body with that member, unless it is a list and there are handlers of ``texts``. ``others``:
        of bodies with other members, on ``/invocations``."""
        self._inputs = inputs
        self._texts = texts
        self._others = others
        self._payload_limit = payload_limit

    async def root(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, _raw_members, self._payload_limit)
        await self._handler(body)(scope, _Again(_encode(body), receive), send)

    async def invocations(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, _raw_members, self._payload_limit)
        if "inputs" in body:
            handler = self._handler(body)
        else:
            found = next((handler for member, handler in self._others.items() if member in body), None)
            if found is None:
                raise WrongJson("data did not match any variant of untagged enum SagemakerRequest")
            handler = found
        await handler(scope, _Again(_encode(body), receive), send)

    def _handler(self, body: Mapping[str, msgspec.Raw]) -> Handler:
        if self._texts is not None and bytes(body.get("inputs", b"")).lstrip().startswith(b"["):
            return self._texts
        return self._inputs


class VertexRoutes:
    def __init__(
        self,
        inference: Inference,
        metrics: Metrics,
        chat: ChatRoutes,
        *,
        payload_limit: int,
        max_client_batch_size: int,
    ) -> None:
        self._inference = inference
        self._metrics = metrics
        self._chat = chat
        self._payload_limit = payload_limit
        self._max_client_batch_size = max_client_batch_size

    async def vertex(self, scope: Scope, receive: Receive, send: Send) -> None:
        """All instances at once; one that fails fails all."""
        body = await read_json(scope, receive, _vertex_body, self._payload_limit)
        if not body.instances:
            raise ValidationError("`instances` must not be empty")
        if len(body.instances) > self._max_client_batch_size:
            raise ValidationError(f"`instances` may be {self._max_client_batch_size} at most")
        texts = await until_disconnect(receive, self._predict(scope, body.instances))
        await send_body(send, _encode(VertexAnswer(texts)), JSON)

    async def _predict(self, scope: Scope, instances: list[msgspec.Raw]) -> list[str]:
        """One request in the metrics, a line of log for each of its generations."""
        started_at = time.perf_counter()
        requests = [await self._request(bytes(instance)) for instance in instances]
        caller = caller_of(scope)
        tasks: list[asyncio.Task[GenerationResult]] = []
        with counted(self._metrics, "vertex"):
            try:
                async with asyncio.TaskGroup() as group:
                    tasks += [group.create_task(self._inference.generate(request, caller)) for request in requests]
            except* Exception as errors:
                raise first_of(errors) from None
        total_s = time.perf_counter() - started_at
        results = [task.result() for task in tasks]
        for request, result in zip(requests, results, strict=True):
            record_success(self._metrics, "vertex", request.parameters, result.best.finished, total_s)
        return [result.best.finished.generated_text for result in results]

    async def _request(self, instance: bytes) -> GenerateRequest:
        members = await decode(instance, _raw_members)
        if "messages" in members:
            return await self._chat.request_of(instance)
        given = await decode(instance, _vertex_instance)
        parameters = given.parameters or GenerateParameters()
        # TGI's Vertex route samples whatever it is told.
        return GenerateRequest(given.inputs, msgspec.structs.replace(parameters, do_sample=True))


class _Again:
    """An ASGI ``receive`` whose body was read already."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}
