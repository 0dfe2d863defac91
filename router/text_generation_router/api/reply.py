"""Small responses, sent in two messages."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.types import Send

JSON = b"application/json"

Headers = Iterable[tuple[bytes, bytes]]


async def send_body(send: Send, body: bytes, content_type: bytes, *, status: int = 200, headers: Headers = ()) -> None:
    """A whole response with a body."""
    all_headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def send_empty(send: Send, status: int, headers: Headers = ()) -> None:
    """A response without a body."""
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0"), *headers]})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
