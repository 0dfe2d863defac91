"""From the bytes of a request to a typed body, within the limits, with the errors of the framework under TGI."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec
from starlette.types import Receive, Scope

from text_generation_router.api.disconnect import ClientGone
from text_generation_router.errors import BodyTooLarge, NotJson, UnsupportedBody, WrongJson
from text_generation_router.json_depth import MAX_DEPTH, is_too_deep

LARGE_BYTES = 256 * 1024
"""A body above this is decoded by a thread: one of 2 MB takes tens of milliseconds, and streams run meanwhile."""

MAX_REASON = 300
"""Characters of the reason why a body is refused."""

# One after the other: they hold the interpreter's lock most of the time.
_thread = ThreadPoolExecutor(1, thread_name_prefix="json")

Body = TypeVar("Body")


def header(scope: Scope, name: bytes) -> bytes | None:
    """First header of that name (lower case), None when there is none."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


async def read_json(scope: Scope, receive: Receive, decoder: msgspec.json.Decoder[Body], limit: int) -> Body:
    """Read the body, at most ``limit`` bytes of it, and decode it.

    Raises: BodyError (400, 413, 415, 422); ClientGone when the connection ends first.
    """
    _check_headers(scope)
    return await decode(await _read(scope, receive, limit), decoder)


async def decode(body: bytes, decoder: msgspec.json.Decoder[Body]) -> Body:
    """Decode strictly, a large body off the event loop. Raises: NotJson, WrongJson."""
    if len(body) <= LARGE_BYTES:
        return _decode(body, decoder)
    return await asyncio.get_running_loop().run_in_executor(_thread, _decode, body, decoder)


def _decode(body: bytes, decoder: msgspec.json.Decoder[Body]) -> Body:
    try:
        if not body.isascii():
            body.decode()  # the decoder skips over what it does not know
        decoded = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise WrongJson(_reason(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NotJson(str(error)) from None
    except RecursionError:
        raise NotJson("recursion limit exceeded") from None
    if is_too_deep(body):
        raise WrongJson(f"recursion limit exceeded: more than {MAX_DEPTH} levels")
    return decoded


def _check_headers(scope: Scope) -> None:
    encoding = header(scope, b"content-encoding")
    if encoding is not None and encoding.strip().lower() not in (b"", b"identity"):
        # A compressed body would pass the size limit and unfold behind it.
        raise UnsupportedBody("Expected request without `Content-Encoding`")
    content_type = header(scope, b"content-type") or b""
    kind, _, subtype = content_type.split(b";", 1)[0].strip().lower().partition(b"/")
    if kind != b"application" or not (subtype == b"json" or subtype.endswith(b"+json")):
        raise UnsupportedBody("Expected request with `Content-Type: application/json`")


async def _read(scope: Scope, receive: Receive, limit: int) -> bytes:
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length[:20]) > limit:
        raise BodyTooLarge
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise BodyTooLarge
        if not message.get("more_body", False):
            return b"".join(chunks) + chunk if chunks else chunk
        chunks.append(chunk)


def _reason(message: str) -> str:
    """msgspec's message with the path in front, where serde puts it. It quotes values, of whatever length."""
    reason, _, path = message.rpartition(" - at `$")
    reason, path = reason[:MAX_REASON], path[:MAX_REASON]
    message = message[:MAX_REASON]
    if not reason:
        return message.replace("Object missing required field", "missing field")
    reason = reason.replace("Object missing required field", "missing field")
    path = path.rstrip("`").lstrip(".")
    return f"{path}: {reason}" if path else reason
