"""The OpenAPI document describes exactly what is served."""

from __future__ import annotations

import re
from typing import Any

import scripted
from starlette.applications import Starlette
from starlette.routing import Route
from text_generation_router.api.edge import Cors
from text_generation_router.api.openapi import OPERATIONS


async def document() -> dict[str, Any]:
    async with scripted.running() as router:
        answer: dict[str, Any] = (await router.client.get("/api-doc/openapi.json")).json()
        return answer


async def test_every_route_is_in_it_and_no_other() -> None:
    async with scripted.running() as router:
        assert isinstance(router.app, Cors)
        application = router.app._app
        assert isinstance(application, Starlette)
        served = {
            (re.sub(r":path", "", route.path), method)
            for route in application.routes
            if isinstance(route, Route) and route.path not in ("/docs/", "/docs/{asset}")
            for method in route.methods or ()
            if method != "HEAD"
        }
    assert served == {(path, method) for path, methods in OPERATIONS.items() for method in methods}
    refusing = {path for path, operations in (await document())["paths"].items() if _may_be_full(operations)}
    assert router.turnstile.paths == refusing


def _may_be_full(operations: dict[str, Any]) -> bool:
    return "429" in operations.get("post", {}).get("responses", {})


async def test_what_is_protected_says_so() -> None:
    async with scripted.running(api_key="secret") as router:
        for path, methods in OPERATIONS.items():
            for method, operation in methods.items():
                status = (await router.client.request(method, path.replace("{model}", "tgi"))).status_code
                assert (status == 401) == operation.protected, (method, path)


async def test_references_lead_somewhere() -> None:
    told = await document()
    names = told["components"]["schemas"].keys()
    references = set(re.findall(r"'#/components/schemas/([^']+)'", repr(told)))
    assert references <= names
    assert told["openapi"] == "3.1.0"


async def test_the_page_and_its_files_come_from_here() -> None:
    async with scripted.running() as router:
        page = await router.client.get("/docs")
        assert page.status_code == 200
        assert "://" not in page.text
        moved = await router.client.get("/docs/")
        assert (moved.status_code, moved.url.join(moved.headers["location"]).path) == (308, "/docs")
        for name in re.findall(r'"(docs/[^"]+)"', page.text):
            asset = await router.client.get(f"/{name}")
            assert asset.status_code == 200
            assert len(asset.content) > 500
        assert (await router.client.get("/docs/other.js")).status_code == 404
