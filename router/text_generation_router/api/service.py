"""The small routes: ``/tokenize``, ``/info``, ``/health`` and its relatives, ``/metrics``."""

from __future__ import annotations

from typing import Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from text_generation_router.api.body import read_json
from text_generation_router.api.disconnect import until_disconnect
from text_generation_router.api.reply import JSON, send_body, send_empty
from text_generation_router.api.schemas import GenerateBody, Info, SimpleToken
from text_generation_router.errors import Unhealthy
from text_generation_router.metrics import Metrics
from text_generation_router.tokenizer import Encoding, RouterTokenizer

_generate_body = msgspec.json.Decoder(GenerateBody)
_encode = msgspec.json.Encoder().encode


class HealthSource(Protocol):
    """Knows, without waiting for anything, whether a request sent now would be served."""

    def ready(self) -> bool: ...


class ServiceRoutes:
    def __init__(
        self,
        tokenizer: RouterTokenizer,
        health: HealthSource,
        metrics: Metrics,
        info: Info,
        *,
        payload_limit: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._health = health
        self._metrics = metrics
        self._info = _encode(info)
        self._payload_limit = payload_limit

    async def tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes no permit, as in TGI: the tokenizer bounds what it holds."""
        body = await read_json(scope, receive, _generate_body, self._payload_limit)
        text = body.inputs
        work = self._tokenizer.encode_then(text, lambda encoding: _encode(simple_tokens(text, encoding)))
        await send_body(send, await until_disconnect(receive, work), JSON)

    async def info(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_body(send, self._info, JSON)

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Readiness; never waits for a step of the model."""
        if not self._health.ready():
            raise Unhealthy
        await send_empty(send, 200)

    async def live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Liveness: whoever reads this answer has proof that the event loop runs."""
        await send_empty(send, 200)

    async def metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_body(send, self._metrics.render(), Metrics.content_type)


def simple_tokens(text: str, encoding: Encoding) -> list[SimpleToken]:
    """Tokens with their byte offsets; those that the tokenizer added stand for no text: "", 0, 0."""
    raw = text.encode()
    pairs = encoding.offsets
    if len(raw) != len(text):
        # Characters begin at the bytes that do not continue one.
        starts = [at for at, byte in enumerate(raw) if byte & 0xC0 != 0x80]
        starts.append(len(raw))
        pairs = [(starts[start], starts[stop]) for start, stop in pairs]
    return [
        SimpleToken(token_id, raw[start:stop].decode(errors="replace"), start, stop)
        for token_id, (start, stop) in zip(encoding.ids, pairs, strict=True)
    ]
