"""Who sent a request, and what it says of itself in its headers."""

from __future__ import annotations

import hashlib
import re
import time

from starlette.types import Scope

from text_generation_router.api.body import header
from text_generation_router.errors import ValidationError
from text_generation_router.generate_request import MAX_PRIORITY, Caller

MAX_TIMEOUT_MS = 24 * 3600 * 1000

_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_NUMBER = re.compile(rb"-?[0-9]{1,9}")


def key_of(scope: Scope) -> bytes | None:
    """The API key that a request carries: ``Authorization: Bearer <key>``; or, as Anthropic's clients send it,
    ``x-api-key: <key>``."""
    scheme, _, key = (header(scope, b"authorization") or b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return key.strip()
    key_alone = header(scope, b"x-api-key")
    return None if key_alone is None else key_alone.strip()


def tenant_of_key(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def tenant_of(scope: Scope) -> bytes:
    """Whose request it is; empty for those of nobody in particular."""
    # Also where no key is asked for, and in any form: a gateway in front may know its tenants by theirs.
    key = key_of(scope) or header(scope, b"authorization")
    return b"" if key is None else tenant_of_key(key)


def caller_of(scope: Scope) -> Caller:
    """Who sent the request of this scope, which an `Endpoint` has noted."""
    caller: Caller = scope["state"]["caller"]
    return caller


def note_caller(scope: Scope) -> None:
    """Read the headers, once, when the request is there: from then on its time runs.

    A malformed trace context is nobody's error and counts as none. Raises: ValidationError for the other headers.
    """
    trace = header(scope, b"traceparent")
    timeout_ms = _number(scope, b"x-request-timeout-ms", 1, MAX_TIMEOUT_MS)
    scope.setdefault("state", {})["caller"] = Caller(
        traceparent=trace.decode("ascii") if trace is not None and _TRACEPARENT.fullmatch(trace) else "",
        tenant=tenant_of(scope),
        priority=_number(scope, b"x-priority", -MAX_PRIORITY, MAX_PRIORITY) or 0,
        timeout_s=None if timeout_ms is None else timeout_ms / 1000,
        asked_at=time.perf_counter(),
    )


def _number(scope: Scope, name: bytes, least: int, most: int) -> int | None:
    text = header(scope, name)
    if text is None:
        return None
    if not _NUMBER.fullmatch(text) or not least <= int(text) <= most:
        raise ValidationError(f"the header `{name.decode()}` must be a whole number from {least} to {most}")
    return int(text)
