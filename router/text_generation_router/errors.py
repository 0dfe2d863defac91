"""The hierarchy of errors a client can see, and its one mapping to HTTP and SSE bodies."""

from __future__ import annotations

from typing import Any, ClassVar

MAX_MESSAGE = 1000
"""Characters of what a client is told: some of it quotes what the client has sent."""


class RouterError(Exception):
    """Base of all errors that end a request. ``str(error)`` is the text a client gets."""

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "internal"
    metric: ClassVar[str] = "generation"
    """Label ``err`` of ``tgi_request_failure``."""

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}...")


class ValidationError(RouterError):
    """The request cannot be served as asked; nothing was queued."""

    status = 422
    error_type = "validation"
    metric = "validation"

    def __init__(self, message: str) -> None:
        super().__init__(f"Input validation error: {message}")


class Unauthorized(RouterError):
    """The request does not carry the key of ``--api-key``."""

    status = 401
    error_type = "invalid_api_key"

    def __init__(self) -> None:
        super().__init__("Incorrect API key provided: send `Authorization: Bearer <key>` with the server's `--api-key`")


class TemplateFailed(RouterError):
    """The chat template cannot make a prompt of the messages, or there is none."""

    status = 422
    error_type = "template_error"
    metric = "template"

    def __init__(self, message: str) -> None:
        super().__init__(f"Template error: {message}")


class ToolError(RouterError):
    """What the request says of tools does not fit together."""

    status = 422
    error_type = "tool_error"
    metric = "validation"

    def __init__(self, message: str) -> None:
        super().__init__(f"Tool error: {message}")


class UnknownModel(RouterError):
    """Another model was asked for than the one that is served."""

    status = 404
    error_type = "model_not_found"
    metric = "validation"

    def __init__(self, asked: str, served: str) -> None:
        super().__init__(f"The model `{asked}` does not exist. This server has `{served}`, also by the name `tgi`")


class BatchTooLarge(RouterError):
    """More prompts in one request than ``--max-client-batch-size``."""

    status = 422
    error_type = "batch size exceeded"
    metric = "validation"

    def __init__(self, limit: int) -> None:
        super().__init__(f"Number of prompts exceeds the maximum allowed batch size of {limit}")


class SuffixUnsupported(RouterError):
    """``suffix`` of a completion."""

    status = 422
    error_type = "suffix not supported"
    metric = "validation"

    def __init__(self) -> None:
        super().__init__("Suffix is not supported and can be achieved by preprocessing the prompt.")


class GeneratesNothing(RouterError):
    """A model that embeds was asked for text."""

    status = 422
    error_type = "validation"
    metric = "validation"

    def __init__(self, model_id: str) -> None:
        super().__init__(f"The model `{model_id}` generates no text, it embeds: use /v1/embeddings, /embed or /")


class Overloaded(RouterError):
    """All ``max_concurrent_requests`` permits are taken, or as many as one API key may have; or the queue is full."""

    status = 429
    error_type = "overloaded"
    metric = "overloaded"

    def __init__(self, retry_after_s: int = 1) -> None:
        """``retry_after_s``: when it is worth to ask again."""
        super().__init__("Model is overloaded")
        self.retry_after_s = retry_after_s


class DeadlineExceeded(RouterError):
    """The time is over that the request's ``x-request-timeout-ms`` gave it."""

    status = 408
    error_type = "timeout"
    metric = "timeout"

    def __init__(self, timeout_s: float) -> None:
        super().__init__(
            f"The request was not answered in the {timeout_s:g} s that its `x-request-timeout-ms` gives it"
        )


NO_SHARD = "Could not connect to Text Generation server: no shard answers"
"""Why a request failed, where the shard that it needs is not there. The first words are TGI's."""


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


def first_of(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """One error of those that a group of tasks ended with."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def error_body(error: RouterError) -> dict[str, str]:
    """The JSON body of an error, the same in a response and in an SSE event."""
    return {"error": str(error), "error_type": error.error_type}


_OPENAI_TYPES = {401: "invalid_request_error", 429: "rate_limit_error"}


def openai_error_body(status: int, message: str, code: str | None) -> dict[str, Any]:
    """The same as OpenAI's clients read it. TGI's own read ``error_type`` beside it."""
    kind = _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 and status != 424 else "server_error")
    error = {"message": message, "type": kind, "param": None, "code": code, "http_status_code": status}
    return {"error": error} if code is None else {"error": error, "error_type": code}


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_error_body(status: int, message: str) -> dict[str, Any]:
    """The same as Anthropic's clients read it."""
    otherwise = "invalid_request_error" if status < 500 and status != 424 else "api_error"
    return {"type": "error", "error": {"type": _ANTHROPIC_TYPES.get(status, otherwise), "message": message}}
