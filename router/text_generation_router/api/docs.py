"""``/docs``, a page to read the OpenAPI document and to try it out. Nothing of it comes from elsewhere."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import msgspec
from starlette.types import Receive, Scope, Send

from text_generation_router.api.openapi import document
from text_generation_router.api.reply import JSON, send_body, send_empty

_ASSETS = {
    "swagger-ui-bundle.js": b"text/javascript; charset=utf-8",
    "swagger-ui.css": b"text/css; charset=utf-8",
    "favicon-32x32.png": b"image/png",
}
_POLICY = (
    b"default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data:; connect-src *"
)
"""The page loads nothing from elsewhere; what it sends goes where its user sends it."""

_PAGE = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Text Generation Inference</title>
<link rel="icon" type="image/png" href="docs/favicon-32x32.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="page"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script>
SwaggerUIBundle({
  url: "api-doc/openapi.json",
  dom_id: "#page",
  deepLinking: true,
  validatorUrl: null,
  defaultModelsExpandDepth: 0,
});
</script>
</body>
</html>
"""
"""Its links are relative, so that it works behind a prefix too."""


class DocsRoutes:
    async def page(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_body(send, _PAGE, b"text/html; charset=utf-8", headers=((b"content-security-policy", _POLICY),))

    async def page_of_tgi(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Its page had a slash behind it, with which the links of ours would lead elsewhere."""
        await send_empty(send, 308, headers=((b"location", b"../docs"),))

    async def openapi(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_body(send, openapi_json(), JSON)

    async def asset(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path_params"]["asset"]
        if name not in _ASSETS:
            await send_empty(send, 404)
            return
        await send_body(send, _asset(name), _ASSETS[name], headers=((b"cache-control", b"max-age=86400"),))


@cache
def openapi_json() -> bytes:
    return msgspec.json.encode(document(version("text-generation-inference")))


@cache
def _asset(name: str) -> bytes:
    spec = find_spec("swagger_ui")  # only its files: the package itself is never imported
    assert spec is not None and spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / "static" / name).read_bytes()
