"""The ASGI application: routes, who may call them, and how errors look. Wiring only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from text_generation_router.api.edge import ApiKey, Cors, Endpoint, Open, Protected
from text_generation_router.api.generate import GenerateRoutes
from text_generation_router.api.service import ServiceRoutes
from text_generation_router.draining import Drain
from text_generation_router.errors import BodyError, InternalError, RouterError, ShuttingDown, error_body

_METHOD_ORDER = ("GET", "HEAD", "POST")


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may call the routes, and until when."""

    drain: Drain
    api_key: str | None = None
    cors_allow_origin: Sequence[str] = ()


def build_app(generate: GenerateRoutes, service: ServiceRoutes, access: Access) -> ASGIApp:
    """Every route of the router. A path that is missing here does not exist."""
    table: dict[str, dict[str, Open | Protected]] = {
        "/": {"GET": Open(service.health), "POST": Protected(generate.compat_generate)},
        "/generate": {"POST": Protected(generate.generate)},
        "/generate_stream": {"POST": Protected(generate.generate_stream)},
        "/tokenize": {"POST": Protected(service.tokenize)},
        "/info": {"GET": Protected(service.info)},
        "/health": {"GET": Open(service.health)},
        "/ping": {"GET": Open(service.health)},
        "/live": {"GET": Open(service.live)},
        "/metrics": {"GET": Open(service.metrics)},
    }
    key = ApiKey(access.api_key)
    routes = [
        Route(path, Endpoint(methods, key, access.drain), methods=list(methods)) for path, methods in table.items()
    ]
    return Cors(_application(routes), access.cors_allow_origin)


def build_metrics_app(service: ServiceRoutes, drain: Drain) -> ASGIApp:
    """What listens on ``--prometheus-port``."""
    endpoint = Endpoint({"GET": Open(service.metrics)}, ApiKey(None), drain)
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


async def _on_router_error(request: Request, error: RouterError) -> Response:
    response = Response(msgspec.json.encode(error_body(error)), error.status, media_type="application/json")
    if isinstance(error, ShuttingDown):
        response.headers["connection"] = "close"
        response.headers["retry-after"] = "1"
    return response


async def _on_body_error(request: Request, error: BodyError) -> Response:
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
    return await _on_router_error(request, InternalError())
