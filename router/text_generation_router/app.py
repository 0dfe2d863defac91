"""The ASGI application: routes, who may call them, and how errors look. Wiring only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from text_generation_router.admission import Admission
from text_generation_router.api.anthropic.messages import MessageRoutes
from text_generation_router.api.docs import DocsRoutes
from text_generation_router.api.edge import ApiKey, Cors, CorsRules, Endpoint, Open, Placed, Protected, Turnstile
from text_generation_router.api.embeddings import EmbeddingRoutes
from text_generation_router.api.generate import GenerateRoutes
from text_generation_router.api.openai.chat import ChatRoutes
from text_generation_router.api.openai.completions import CompletionRoutes
from text_generation_router.api.openai.models import ModelRoutes
from text_generation_router.api.openai.responses import ResponseRoutes
from text_generation_router.api.platforms import SharedPaths, VertexRoutes
from text_generation_router.api.service import ServiceRoutes
from text_generation_router.draining import Drain
from text_generation_router.errors import (
    BodyError,
    GeneratesNothing,
    InternalError,
    Overloaded,
    RouterError,
    ShuttingDown,
    Unauthorized,
    ValidationError,
    anthropic_error_body,
    error_body,
    openai_error_body,
)
from text_generation_router.metrics import Metrics

_METHOD_ORDER = ("GET", "HEAD", "POST")


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may call the routes, and until when."""

    drain: Drain
    admission: Admission
    metrics: Metrics
    """Where those are counted that are not let in."""
    api_keys: Sequence[str] = ()
    """None: everybody may."""
    cors_allow_origin: Sequence[str] = ()
    aip_predict_route: str | None = None
    """Where Vertex AI sends requests, beside ``/vertex``."""
    aip_health_route: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratingRoutes:
    """The handlers that write text."""

    generate: GenerateRoutes
    chat: ChatRoutes
    completions: CompletionRoutes
    messages: MessageRoutes
    responses: ResponseRoutes
    vertex: VertexRoutes


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """The handlers, by what they are about."""

    service: ServiceRoutes
    models: ModelRoutes
    shared: SharedPaths
    generating: GeneratingRoutes | None
    """None: the model embeds, and writes nothing."""
    embeddings: EmbeddingRoutes | None
    """None: the model hands out no hidden states."""
    model_id: str


def build_app(routes_of: Routes, access: Access) -> ASGIApp:
    """Every route of the router. A path that is missing here does not exist."""
    service, docs = routes_of.service, DocsRoutes()
    gets: dict[str, Open | Protected] = {
        "/": Open(service.health),
        "/docs": Open(docs.page),
        "/docs/": Open(docs.page_of_tgi),
        "/docs/{asset}": Open(docs.asset),
        "/api-doc/openapi.json": Open(docs.openapi),
        "/v1/models": Protected(routes_of.models.list),
        "/v1/models/{model:path}": Protected(routes_of.models.one),
        "/info": Protected(service.info),
        "/health": Open(service.health),
        "/ping": Open(service.health),
        "/live": Open(service.live),
        "/metrics": Open(service.metrics),
    }
    if access.aip_health_route is not None:
        gets.setdefault(access.aip_health_route, Open(service.health))
    table: dict[str, dict[str, Open | Protected]] = {path: {"GET": row} for path, row in gets.items()}
    for path, row in _posts(routes_of, access).items():
        table.setdefault(path, {})["POST"] = row
    key = ApiKey(access.api_keys)
    routes = [
        Route(path, Endpoint(methods, key, access.drain), methods=list(methods)) for path, methods in table.items()
    ]
    return Cors(_application(routes), CorsRules(access.cors_allow_origin))


def build_turnstile(routes_of: Routes, access: Access) -> Turnstile:
    """What stands before them."""
    return Turnstile(
        frozenset(path for path, row in _posts(routes_of, access).items() if isinstance(row, Placed)),
        ApiKey(access.api_keys),
        CorsRules(access.cors_allow_origin),
        access.admission,
        access.metrics,
        _error_response,
    )


def _posts(routes_of: Routes, access: Access) -> dict[str, Protected]:
    posts = {
        "/": Placed(routes_of.shared.root),
        "/invocations": Placed(routes_of.shared.invocations),
        "/tokenize": Protected(routes_of.service.tokenize),
        **_generating(routes_of.generating, routes_of.model_id),
        **_embedding(routes_of.embeddings, routes_of.model_id),
    }
    if access.aip_predict_route is not None:
        posts[access.aip_predict_route] = posts["/vertex"]
    return posts


def _generating(routes: GeneratingRoutes | None, model_id: str) -> dict[str, Protected]:
    refuse = _refusing(GeneratesNothing(model_id))
    return {
        "/generate": Placed(routes.generate.generate) if routes else refuse,
        "/generate_stream": Placed(routes.generate.generate_stream) if routes else refuse,
        "/chat_tokenize": Protected(routes.chat.tokenize) if routes else refuse,
        "/v1/chat/completions": Placed(routes.chat.completions) if routes else refuse,
        "/v1/completions": Placed(routes.completions.completions) if routes else refuse,
        "/v1/responses": Placed(routes.responses.responses) if routes else refuse,
        "/v1/messages": Placed(routes.messages.messages) if routes else refuse,
        "/v1/messages/count_tokens": Protected(routes.messages.count_tokens) if routes else refuse,
        "/vertex": Placed(routes.vertex.vertex) if routes else refuse,
    }


def _embedding(routes: EmbeddingRoutes | None, model_id: str) -> dict[str, Protected]:
    refuse = _refusing(ValidationError(f"the model `{model_id}` embeds nothing: it hands out no hidden states"))
    return {
        "/v1/embeddings": Placed(routes.openai) if routes else refuse,
        "/embed": Placed(routes.embed) if routes else refuse,
    }


def _refusing(error: RouterError) -> Protected:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    return Protected(refuse)


def build_metrics_app(service: ServiceRoutes, drain: Drain) -> ASGIApp:
    """What listens on ``--prometheus-port``."""
    endpoint = Endpoint({"GET": Open(service.metrics)}, ApiKey(), drain)
    return _application([Route("/metrics", endpoint, methods=["GET"])])


def _application(routes: list[Route]) -> Starlette:
    handlers = {
        RouterError: _on_router_error,
        BodyError: _on_body_error,
        HTTPException: _on_http_exception,
        Exception: _on_defect,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]  # exceptions are covariant there
    app.router.redirect_slashes = False  # TGI knows no path with a slash at its end
    return app


ErrorBody = Callable[[int, str, str | None], dict[str, Any]]
"""Status, text and TGI's type of an error -> its body."""


_OPENAI_PATHS = ("/v1/chat/", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/models")


def _foreign_form(path: str) -> ErrorBody | None:
    """The form of errors on paths that are not TGI's."""
    if path.startswith("/v1/messages"):
        return lambda status, message, code: anthropic_error_body(status, message)
    return openai_error_body if path.startswith(_OPENAI_PATHS) else None


def _json(status: int, body: object) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


async def _on_router_error(request: Request, error: RouterError) -> Response:
    return _error_response(request.scope["path"], error)


def _error_response(path: str, error: RouterError) -> Response:
    form = _foreign_form(path)
    if form is not None:
        response = _json(error.status, form(error.status, str(error), error.error_type))
    elif isinstance(error, Unauthorized):
        response = Response(status_code=error.status)  # TGI says no more
    else:
        response = _json(error.status, error_body(error))
    if isinstance(error, ShuttingDown):
        response.headers["connection"] = "close"
        response.headers["retry-after"] = "1"
    elif isinstance(error, Overloaded):
        response.headers["retry-after"] = str(error.retry_after_s)
    return response


async def _on_body_error(request: Request, error: BodyError) -> Response:
    form = _foreign_form(request.scope["path"])
    if form is not None:
        response = _json(error.status, form(error.status, str(error), None))
    else:
        response = Response(str(error), error.status, media_type="text/plain")
    if error.status in (413, 415) and "expect" in request.headers:
        response.headers["connection"] = "close"  # nobody knows whether the body will come
    return response


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    """No such path, or no such method: nothing but the status, as TGI's framework answers."""
    allowed = (error.headers or {}).get("Allow", "")
    methods = [method for method in _METHOD_ORDER if method in allowed]
    return Response(status_code=error.status_code, headers={"allow": ",".join(methods)} if methods else None)


async def _on_defect(request: Request, error: Exception) -> Response:
    return _error_response(request.scope["path"], InternalError())
