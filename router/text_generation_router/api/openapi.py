"""The OpenAPI document of what is served, made from the types that bodies are decoded to and answers encoded from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from text_generation_router.api.anthropic.schemas import MessageOut, MessagesBody, TokenCount
from text_generation_router.api.caller import MAX_TIMEOUT_MS
from text_generation_router.api.embeddings import EmbedBody, EmbeddingsAnswer, EmbeddingsBody
from text_generation_router.api.openai.responses_input import ResponsesBody
from text_generation_router.api.openai.schemas import (
    ChatBody,
    ChatChunk,
    ChatCompletion,
    ChatTokenized,
    Completion,
    CompletionBody,
    Model,
    ModelList,
    TgiDelta,
)
from text_generation_router.api.platforms import VertexAnswer, VertexRequest
from text_generation_router.api.schemas import (
    CompatGenerateBody,
    GenerateBody,
    GenerateResponse,
    Info,
    SimpleToken,
    StreamResponse,
)
from text_generation_router.generate_request import MAX_PRIORITY


class ErrorBody(msgspec.Struct):
    """An error of TGI's routes."""

    error: str
    error_type: str


class OpenAIError(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None
    http_status_code: int


class OpenAIErrorBody(msgspec.Struct):
    """An error of OpenAI's routes."""

    error: OpenAIError
    error_type: str | msgspec.UnsetType = msgspec.UNSET


class AnthropicError(msgspec.Struct):
    type: str
    message: str


class AnthropicErrorBody(msgspec.Struct):
    """An error of Anthropic's routes."""

    type: str
    error: AnthropicError


class ResponseObject(msgspec.Struct):
    """A response of OpenAI's newer API; its other members are in OpenAI's reference."""

    id: str
    object: str
    status: str
    output: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    summary: str
    tag: str
    body: Any = None
    """Type of the request's JSON, if it has any; several types are alternatives, here and below."""
    answer: Any = None
    """Type of the answer's JSON; None is an empty answer, ``str`` is text."""
    event: Any = None
    """Type of an event, where the answer may be a stream."""
    error: Any = ErrorBody
    protected: bool = True


TGI, OPENAI, ANTHROPIC, PLATFORMS, SERVICE = "TGI", "OpenAI", "Anthropic", "Platforms", "Service"

OPERATIONS: Mapping[str, Mapping[str, Operation]] = {
    "/": {
        "GET": Operation(summary="Readiness, as /health", tag=SERVICE, protected=False),
        "POST": Operation(
            summary="Generate tokens, or a stream of them if `stream` is true; embed a list of texts",
            tag=TGI,
            body=(CompatGenerateBody, EmbedBody),
            answer=(list[GenerateResponse], list[list[float]]),
            event=StreamResponse,
        ),
    },
    "/generate": {
        "POST": Operation(summary="Generate tokens", tag=TGI, body=GenerateBody, answer=GenerateResponse),
    },
    "/generate_stream": {
        "POST": Operation(
            summary="Generate a stream of tokens",
            tag=TGI,
            body=GenerateBody,
            event=StreamResponse,
            answer=msgspec.UNSET,
        ),
    },
    "/tokenize": {
        "POST": Operation(summary="Tokenize inputs", tag=TGI, body=GenerateBody, answer=list[SimpleToken]),
    },
    "/chat_tokenize": {
        "POST": Operation(summary="Template and tokenize a chat", tag=TGI, body=ChatBody, answer=ChatTokenized),
    },
    "/info": {"GET": Operation(summary="Model and limits", tag=SERVICE, answer=Info)},
    "/health": {"GET": Operation(summary="Readiness", tag=SERVICE, protected=False)},
    "/ping": {"GET": Operation(summary="Readiness, as SageMaker asks", tag=SERVICE, protected=False)},
    "/live": {"GET": Operation(summary="Liveness", tag=SERVICE, protected=False)},
    "/metrics": {"GET": Operation(summary="Prometheus metrics", tag=SERVICE, answer=str, protected=False)},
    "/docs": {"GET": Operation(summary="This document to read", tag=SERVICE, answer=str, protected=False)},
    "/api-doc/openapi.json": {
        "GET": Operation(summary="This document", tag=SERVICE, answer=dict[str, Any], protected=False)
    },
    "/v1/chat/completions": {
        "POST": Operation(
            summary="Answer a chat",
            tag=OPENAI,
            body=ChatBody,
            answer=ChatCompletion,
            event=ChatChunk,
            error=OpenAIErrorBody,
        ),
    },
    "/v1/completions": {
        "POST": Operation(
            summary="Complete prompts",
            tag=OPENAI,
            body=CompletionBody,
            answer=Completion,
            event=Completion,
            error=OpenAIErrorBody,
        ),
    },
    "/v1/responses": {
        "POST": Operation(
            summary="Answer, in OpenAI's newer form",
            tag=OPENAI,
            body=ResponsesBody,
            answer=ResponseObject,
            event=dict[str, Any],
            error=OpenAIErrorBody,
        ),
    },
    "/v1/embeddings": {
        "POST": Operation(
            summary="Vectors of texts", tag=OPENAI, body=EmbeddingsBody, answer=EmbeddingsAnswer, error=OpenAIErrorBody
        ),
    },
    "/embed": {
        "POST": Operation(
            summary="Vectors of texts, as text-embeddings-inference gives them",
            tag=TGI,
            body=EmbedBody,
            answer=list[list[float]],
        ),
    },
    "/v1/models": {"GET": Operation(summary="Models", tag=OPENAI, answer=ModelList, error=OpenAIErrorBody)},
    "/v1/models/{model}": {"GET": Operation(summary="A model", tag=OPENAI, answer=Model, error=OpenAIErrorBody)},
    "/v1/messages": {
        "POST": Operation(
            summary="Answer messages",
            tag=ANTHROPIC,
            body=MessagesBody,
            answer=MessageOut,
            event=dict[str, Any],
            error=AnthropicErrorBody,
        ),
    },
    "/v1/messages/count_tokens": {
        "POST": Operation(
            summary="Count the tokens of messages",
            tag=ANTHROPIC,
            body=MessagesBody,
            answer=TokenCount,
            error=AnthropicErrorBody,
        ),
    },
    "/invocations": {
        "POST": Operation(
            summary="SageMaker: a body of /, /v1/chat/completions or /v1/completions",
            tag=PLATFORMS,
            body=dict[str, Any],
            answer=dict[str, Any] | list[dict[str, Any]],
            event=dict[str, Any],
        ),
    },
    "/vertex": {
        "POST": Operation(
            summary="Vertex AI: several instances", tag=PLATFORMS, body=VertexRequest, answer=VertexAnswer
        ),
    },
}

_TEXTS = {
    "400": "The body is no JSON",
    "401": "The API key is missing or wrong",
    "404": "There is no such model",
    "408": "The time is over that `x-request-timeout-ms` gives it",
    "413": "The body is longer than `--payload-limit`",
    "415": "The body is no plain JSON by its headers",
    "422": "The request cannot be served as asked; the text says why",
    "424": "A shard failed while the request ran",
    "429": "The server is full",
    "500": "A defect of the server",
    "503": "The server is not ready, or shutting down",
}
_HEADERS = (
    (
        "x-priority",
        "Among the requests of one API key the highest is first; `priority` in the body has the last word",
        {"minimum": -MAX_PRIORITY, "maximum": MAX_PRIORITY},
    ),
    (
        "x-request-timeout-ms",
        "What is not answered by then is not wanted any more",
        {"minimum": 1, "maximum": MAX_TIMEOUT_MS},
    ),
)
_OF_BODY = ("400", "413", "415", "422")
_OF_GENERATION = ("408", "424", "429", "500")


def document(version: str) -> dict[str, Any]:
    """OpenAPI 3.1."""
    types = [
        each
        for methods in OPERATIONS.values()
        for operation in methods.values()
        for given in (operation.body, operation.answer, operation.event, operation.error)
        for each in (given if isinstance(given, tuple) else (given,))
        if each not in (None, str, msgspec.UNSET)
    ]
    types.append(TgiDelta)
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    # Which of the two it is, the request says: the library has no words for that.
    delta = components["ChunkChoice"]["properties"]["delta"]
    components["ChunkChoice"]["properties"]["delta"] = {"anyOf": [delta, schemas[-1]]}
    by_type = dict(zip(map(repr, types), schemas, strict=True))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Text Generation Inference",
            "description": "Text generation with TGI's API, OpenAI's and Anthropic's.",
            "license": {"name": "Apache 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
            "version": version,
        },
        "paths": {
            path: {
                method.lower(): _operation(path, method, operation, by_type) for method, operation in methods.items()
            }
            for path, methods in OPERATIONS.items()
        },
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(path: str, method: str, operation: Operation, by_type: Mapping[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.answer is str:
        kind = "text/html" if path == "/docs" else "text/plain"
        content[kind] = {"schema": {"type": "string"}}
    elif operation.answer not in (None, msgspec.UNSET):
        content["application/json"] = {"schema": _schema(operation.answer, by_type)}
    if operation.event is not None:
        content["text/event-stream"] = {"schema": _event_schema(_schema(operation.event, by_type))}
    responses: dict[str, Any] = {"200": {"description": "OK", **({"content": content} if content else {})}}
    for status in _statuses(path, operation):
        responses[status] = {"description": _TEXTS[status]}
        is_text = operation.error is ErrorBody and status in ("400", "413", "415")
        if is_text:
            responses[status]["content"] = {"text/plain": {"schema": {"type": "string"}}}
        elif not (status == "401" and operation.error is ErrorBody):
            responses[status]["content"] = {"application/json": {"schema": _schema(operation.error, by_type)}}
            if status == "422" and operation.error is ErrorBody:
                responses[status]["content"]["text/plain"] = {"schema": {"type": "string"}}
    result: dict[str, Any] = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "operationId": f"{method.lower()}_{path.strip('/').replace('/', '_').translate(_PLAIN) or 'root'}",
        "responses": responses,
    }
    if operation.body is not None:
        schema = _schema(operation.body, by_type)
        result["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if "{model}" in path:
        result["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if _computes(path, operation):
        result["parameters"] = [
            {"name": name, "in": "header", "description": text, "schema": {"type": "integer", **bounds}}
            for name, text, bounds in _HEADERS
        ]
    if operation.protected:
        result["security"] = [{"key": []}]
    return result


def _schema(given: Any, by_type: Mapping[str, Any]) -> Any:
    if isinstance(given, tuple):
        return {"anyOf": [by_type[repr(each)] for each in given]}
    return by_type[repr(given)]


def _event_schema(data: Any) -> dict[str, Any]:
    """Of one event: its data is JSON, or the word that ends OpenAI's streams."""
    json_text = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    return {
        "type": "object",
        "properties": {"data": {"anyOf": [json_text, {"const": "[DONE]"}]}, "event": {"type": "string"}},
        "required": ["data"],
    }


_PLAIN = str.maketrans({"{": None, "}": None, "-": "_", ".": "_"})


def _computes(path: str, operation: Operation) -> bool:
    """Whether the model has something to do."""
    return operation.body is not None and path not in ("/tokenize", "/chat_tokenize", "/v1/messages/count_tokens")


def _statuses(path: str, operation: Operation) -> list[str]:
    statuses = ["401", "503"] if operation.protected else []
    if path in ("/", "/health", "/ping"):
        statuses.append("503")
    if operation.body is not None:
        statuses += _OF_BODY
    if _computes(path, operation):
        statuses += _OF_GENERATION
    if path.startswith("/v1/"):
        statuses.append("404")
    return sorted(set(statuses))
