"""Who sent a request."""

from __future__ import annotations

import hashlib
import re

from starlette.types import Scope

from text_generation_router.api.body import header
from text_generation_router.generate_request import Caller

_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def caller_of(scope: Scope) -> Caller:
    """A malformed trace context is nobody's error and counts as none."""
    trace = header(scope, b"traceparent")
    key = header(scope, b"authorization") or header(scope, b"x-api-key")
    return Caller(
        traceparent=trace.decode("ascii") if trace is not None and _TRACEPARENT.fullmatch(trace) else "",
        # Also where no key is asked for: a gateway in front may know its tenants by theirs.
        cache_salt=b"" if key is None else hashlib.sha256(key).digest(),
    )
