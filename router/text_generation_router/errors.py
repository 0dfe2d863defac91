"""The hierarchy of errors a client can see, and its one mapping to HTTP and SSE bodies."""

from __future__ import annotations

from typing import ClassVar


class RouterError(Exception):
    """Base of all errors that end a request. ``str(error)`` is the text a client gets."""

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "internal"
    metric: ClassVar[str] = "generation"
    """Label ``err`` of ``tgi_request_failure``."""


class ValidationError(RouterError):
    """The request cannot be served as asked; nothing was queued."""

    status = 422
    error_type = "validation"
    metric = "validation"

    def __init__(self, message: str) -> None:
        super().__init__(f"Input validation error: {message}")


class Overloaded(RouterError):
    """All ``max_concurrent_requests`` permits are taken."""

    status = 429
    error_type = "overloaded"
    metric = "overloaded"

    def __init__(self) -> None:
        super().__init__("Model is overloaded")


class GenerationFailed(RouterError):
    """A shard failed or refused the request while it ran."""

    status = 424
    error_type = "generation"
    metric = "generation"

    def __init__(self, message: str) -> None:
        super().__init__(f"Request failed during generation: {message}")


class IncompleteGeneration(RouterError):
    """The stream of a request ended without its last token."""

    error_type = "incomplete_generation"
    metric = "incomplete"

    def __init__(self) -> None:
        super().__init__("Incomplete generation")


class IncompleteGenerationStream(RouterError):
    """The same, seen by a streaming client: its event stream breaks off."""

    error_type = "incomplete_generation_stream"
    metric = "incomplete"

    def __init__(self) -> None:
        super().__init__("Incomplete generation stream")


class InternalError(RouterError):
    """A defect of ours; the log has the traceback, the client gets no detail of it."""

    metric = "internal"

    def __init__(self) -> None:
        super().__init__("Internal server error")


class Unhealthy(RouterError):
    """Readiness probe: the shards do not make progress."""

    status = 503
    error_type = "healthcheck"

    def __init__(self) -> None:
        super().__init__("unhealthy")


class ShuttingDown(RouterError):
    """The server drains: it finishes what runs and takes nothing new."""

    status = 503
    error_type = "shutting_down"
    metric = "shutting_down"

    def __init__(self) -> None:
        super().__init__("Server is shutting down")


class BodyError(Exception):
    """A body that never becomes a request. Plain text and TGI's prefixes, as the framework under TGI answers."""

    status: ClassVar[int]

    def __init__(self, text: str) -> None:
        super().__init__(text)


class NotJson(BodyError):
    """The body is no JSON document."""

    status = 400

    def __init__(self, reason: str) -> None:
        super().__init__(f"Failed to parse the request body as JSON: {reason}")


class BodyTooLarge(BodyError):
    """The body is longer than ``--payload-limit``."""

    status = 413

    def __init__(self) -> None:
        super().__init__("Failed to buffer the request body: length limit exceeded")


class UnsupportedBody(BodyError):
    """The headers announce something that is not plain JSON."""

    status = 415


class WrongJson(BodyError):
    """JSON, but not of this route: a wrong type, a number out of range, a missing field."""

    status = 422

    def __init__(self, reason: str) -> None:
        super().__init__(f"Failed to deserialize the JSON body into the target type: {reason}")


def error_body(error: RouterError) -> dict[str, str]:
    """The JSON body of an error, the same in a response and in an SSE event."""
    return {"error": str(error), "error_type": error.error_type}
