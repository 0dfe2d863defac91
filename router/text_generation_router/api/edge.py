"""What stands before a handler: CORS, whether there is room, the API key, the way out, and errors that have no body."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from text_generation_router.admission import Admission
from text_generation_router.api.accounting import count_refusal
from text_generation_router.api.body import header
from text_generation_router.api.caller import key_of, note_caller, tenant_of, tenant_of_key
from text_generation_router.api.disconnect import ClientGone
from text_generation_router.api.reply import send_empty
from text_generation_router.draining import Drain
from text_generation_router.errors import RouterError, ShuttingDown, Unauthorized
from text_generation_router.metrics import Metrics

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]

_VARY = (b"vary", b"origin, access-control-request-method, access-control-request-headers")


@dataclass(frozen=True, slots=True)
class Open:
    """A handler that anybody may call: it costs nothing and discloses nothing."""

    handler: Handler


@dataclass(frozen=True, slots=True)
class Protected:
    """A handler behind the API key."""

    handler: Handler


@dataclass(frozen=True, slots=True)
class Placed(Protected):
    """One whose requests need a place among those that the model computes."""


class ApiKey:
    """The keys of ``--api-key``; without any everybody is let in."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [tenant_of_key(key.encode()) for key in keys]

    def admits(self, scope: Scope) -> bool:
        """Whether the request carries one of the keys, case-sensitive."""
        if not self._digests:
            return True
        # Digests have one length, and all are compared: the time it takes says nothing of the keys.
        given = tenant_of_key(key_of(scope) or b"")
        return any([hmac.compare_digest(given, digest) for digest in self._digests])


class Endpoint:
    """All methods of one path, as an ASGI application. A route is protected unless it says otherwise."""

    def __init__(self, methods: Mapping[str, Open | Protected], key: ApiKey, drain: Drain) -> None:
        self._methods = methods
        self._key = key
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"]
        row = self._methods["GET" if method == "HEAD" else method]
        if isinstance(row, Protected):
            if not self._key.admits(scope):
                raise Unauthorized
            if method == "POST":
                if self._drain.begun:
                    raise ShuttingDown
                note_caller(scope)
                receive = _BodyReceive(receive, self._drain)
        with self._drain:
            try:
                await row.handler(scope, receive, send)
            except ClientGone:  # nobody is left to be answered; one that only stopped reading would keep its connection
                abort = scope.get("state", {}).get("abort")
                if abort is not None:
                    abort()


class _BodyReceive:
    """An ASGI ``receive`` that gives up on an unfinished body when the drain begins: nobody knows how long it takes."""

    def __init__(self, receive: Receive, drain: Drain) -> None:
        self._receive = receive
        self._drain = drain
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        message = await self._drain.unless_begun(self._next())
        self._complete = not message.get("more_body", False)
        return message

    async def _next(self) -> Message:
        return await self._receive()


class CorsRules:
    """TGI's: GET and POST, the header ``content-type``, any origin or the listed ones, never credentials.

    Listed origins may send ``authorization`` as well: whoever names them means to let their pages use the key.
    """

    def __init__(self, origins: Sequence[str] = ()) -> None:
        self._any_origin = not origins or "*" in origins
        self._origins = frozenset(origin.encode("latin-1", "replace") for origin in origins)
        allowed = b"content-type" if self._any_origin else b"content-type,authorization"
        self.preflight = ((b"access-control-allow-methods", b"GET,POST"), (b"access-control-allow-headers", allowed))

    def headers(self, scope: Scope) -> tuple[tuple[bytes, bytes], ...]:
        """Of every answer."""
        if self._any_origin:
            return (_VARY, (b"access-control-allow-origin", b"*"))
        origin = header(scope, b"origin")
        if origin in self._origins and origin is not None:
            return (_VARY, (b"access-control-allow-origin", origin))
        return (_VARY,)


class Cors:
    """Adds their headers to every answer, and answers for every path what a page may ask."""

    def __init__(self, app: ASGIApp, rules: CorsRules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = self._rules.headers(scope)
        if scope["method"] == "OPTIONS":
            await send_empty(send, 200, (*headers, *self._rules.preflight))
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        await self._app(scope, receive, send_with_headers)


class Turnstile:
    """Turns requests away that would find no place, before anything else of them is looked at.

    A full server refuses many, some come back many times, and all that is done for them is done on the processors of
    those that run. What it lets pass may find no place yet.
    """

    def __init__(
        self,
        paths: Collection[str],
        key: ApiKey,
        cors: CorsRules,
        admission: Admission,
        metrics: Metrics,
        respond: Callable[[str, RouterError], Response],
    ) -> None:
        """``paths``: where requests need a place. ``respond``: path, error -> what the client gets."""
        self.paths = paths
        self._key = key
        self._cors = cors
        self._admission = admission
        self._metrics = metrics
        self._respond = respond

    def refusal(self, scope: Scope) -> Response | None:
        """The answer to a request of which there is no more than its head; None: it may pass."""
        if not self._refuses(scope):
            return None
        path, error = scope["path"], self._admission.turn_away()
        count_refusal(self._metrics, path, error)
        response = self._respond(path, error)
        response.raw_headers += self._cors.headers(scope)
        return response

    def _refuses(self, scope: Scope) -> bool:
        return (
            scope["method"] == "POST"
            and scope["path"] in self.paths
            and not self._admission.draining
            and self._admission.is_full(tenant_of(scope))
            and self._key.admits(scope)
            and header(scope, b"expect") is None  # else nobody knows whether the body will come
        )
