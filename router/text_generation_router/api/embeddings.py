"""``/v1/embeddings``, ``/embed``, and ``POST /`` for texts that are to be embedded."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
from starlette.types import Receive, Scope, Send

from text_generation_router.api.accounting import counted, record_embedded
from text_generation_router.api.body import read_json
from text_generation_router.api.caller import caller_of
from text_generation_router.api.disconnect import until_disconnect
from text_generation_router.api.headers import embedding_headers
from text_generation_router.api.reply import JSON, send_body
from text_generation_router.api.served import Served
from text_generation_router.embedding.embedder import Embedded, Embedder
from text_generation_router.embedding.requests import VECTORS_AT_ONCE, TextsRequest, Vectors
from text_generation_router.errors import ValidationError
from text_generation_router.generate_request import U32, ShortText


class EmbeddingsBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of ``/v1/embeddings``."""

    input: str | list[str | U32 | list[U32]]
    model: ShortText | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: U32 | None = None
    user: ShortText | None = None
    """Nobody is watched here, and the answer does not depend on it."""


class EmbedBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of ``/embed``, as text-embeddings-inference takes it, and of ``/`` where texts are embedded."""

    inputs: str | list[str | list[U32]]
    normalize: bool | None = None
    truncate: bool | None = None
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = None
    prompt_name: ShortText | None = None
    dimensions: U32 | None = None


class EmbeddingBody(msgspec.Struct):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Numbers, or the base64 text of their 32-bit values."""


class EmbeddingsUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(msgspec.Struct):
    object: Literal["list"]
    data: list[EmbeddingBody]
    model: str
    usage: EmbeddingsUsage


_embeddings_body = msgspec.json.Decoder(EmbeddingsBody)
_embed_body = msgspec.json.Decoder(EmbedBody)
_encode = msgspec.json.Encoder().encode


class EmbeddingRoutes:
    def __init__(self, served: Served, embedder: Embedder) -> None:
        self._served = served
        self._embedder = embedder

    async def openai(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, _embeddings_body, self._served.payload_limit)
        await until_disconnect(receive, self._openai(scope, send, body))

    async def embed(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json(scope, receive, _embed_body, self._served.payload_limit)
        await until_disconnect(receive, self._embed(scope, send, body))

    async def _openai(self, scope: Scope, send: Send, body: EmbeddingsBody) -> None:
        started_at = time.perf_counter()
        with counted(self._served.metrics, "embeddings"):
            self._served.check_model(body.model)
            request = TextsRequest(inputs=_texts(body.input), dimensions=body.dimensions)
            embedded = await self._embedder.embed(request, caller_of(scope))
        vectors, tokens = embedded.vectors, embedded.vectors.num_tokens

        def encode(start: int, stop: int) -> bytes:
            items: Sequence[list[float] | str] = (
                [base64.b64encode(raw).decode("ascii") for raw in vectors.raw[start:stop]]
                if body.encoding_format == "base64"
                else vectors.as_lists(start, stop)
            )
            return _encode([EmbeddingBody("embedding", start + offset, item) for offset, item in enumerate(items)])

        envelope = _encode(EmbeddingsAnswer("list", [], self._served.model_id, EmbeddingsUsage(tokens, tokens)))
        before, _, after = envelope.partition(b"[]")
        data = await _joined(vectors, encode)
        await self._answer(scope, send, before + data + after, request, embedded, started_at)

    async def _embed(self, scope: Scope, send: Send, body: EmbedBody) -> None:
        started_at = time.perf_counter()
        with counted(self._served.metrics, "embed"):
            request = TextsRequest(
                inputs=[body.inputs] if isinstance(body.inputs, str) else body.inputs,
                normalize=body.normalize,
                truncate=body.truncate is True,
                keep_end=(body.truncation_direction or "").lower() == "left",
                prompt_name=body.prompt_name,
                dimensions=body.dimensions,
            )
            embedded = await self._embedder.embed(request, caller_of(scope))
        vectors = embedded.vectors
        data = await _joined(vectors, lambda start, stop: _encode(vectors.as_lists(start, stop)))
        await self._answer(scope, send, data, request, embedded, started_at)

    async def _answer(
        self, scope: Scope, send: Send, body: bytes, request: TextsRequest, embedded: Embedded, started_at: float
    ) -> None:
        total_s = time.perf_counter() - started_at
        record_embedded(self._served.metrics, embedded, total_s)
        headers = embedding_headers(
            self._served.compute_type,
            sum(len(text) for text in request.inputs if isinstance(text, str)),
            validation_s=embedded.validation_s,
            inference_s=embedded.inference_s,
            prompt_tokens=embedded.vectors.num_tokens,
            total_s=total_s,
        )
        await send_body(send, body, JSON, headers=headers)


def _texts(given: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """A text, a list of texts, token ids, or a list of lists of them. Raises: ValidationError."""
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(each, int) for each in given):
        return [[each for each in given if isinstance(each, int)]]
    texts: list[str | list[int]] = []
    for each in given:
        if isinstance(each, int):
            raise ValidationError("`input` is a text, a list of texts, token ids, or a list of lists of them")
        texts.append(each)
    return texts


async def _joined(vectors: Vectors, encode: Callable[[int, int], bytes]) -> bytes:
    """One JSON list of the lists that ``encode`` makes of some vectors at a time."""
    parts: list[bytes] = []
    for start in range(0, len(vectors.raw), VECTORS_AT_ONCE):
        parts.append(encode(start, start + VECTORS_AT_ONCE)[1:-1])
        await asyncio.sleep(0)
    return b"[" + b",".join(parts) + b"]"
