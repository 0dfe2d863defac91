"""Bodies of the native routes, as they are sent and as they are answered.

Requests are decoded strictly, as serde does for TGI: no number from a string or a boolean, no integer from 1.0, no
NaN, no null where a field is not optional; unknown fields are ignored. The order of response fields is TGI's.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from text_generation_router.generate_request import GenerateParameters
from text_generation_router.scheduling.requests import Token


def _absent_parameters() -> GenerateParameters:
    # TGI's default for a missing object differs from that of an empty one: it samples.
    return GenerateParameters(do_sample=True)


class GenerateBody(msgspec.Struct, frozen=True):
    """Body of ``/generate``, ``/generate_stream`` and ``/tokenize``."""

    inputs: str
    parameters: GenerateParameters = msgspec.field(default_factory=_absent_parameters)


class CompatGenerateBody(msgspec.Struct, frozen=True):
    """Body of ``POST /``."""

    inputs: str
    parameters: GenerateParameters = msgspec.field(default_factory=_absent_parameters)
    stream: bool = False


# ---------------------------------------------------------------------------------------------------


class TokenBody(msgspec.Struct, gc=False):
    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillTokenBody(msgspec.Struct, gc=False):
    id: int
    text: str
    logprob: float | None


def as_f32(logprob: float | None) -> float | None:
    """A logprob with the digits TGI prints: it is a 32-bit float, known to seven of them. NaN is sent as null."""
    return None if logprob is None else float(f"{logprob:.7g}")


def token_body(token: Token) -> TokenBody:
    """The token as it is sent."""
    return TokenBody(token.id, token.text, as_f32(token.logprob), token.special)


class BestOfSequence(msgspec.Struct):
    """A choice that was not the best one."""

    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillTokenBody]
    tokens: list[TokenBody]
    top_tokens: list[list[TokenBody]] | UnsetType = UNSET


class Details(msgspec.Struct):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillTokenBody]
    tokens: list[TokenBody]
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET
    top_tokens: list[list[TokenBody]] | UnsetType = UNSET


class GenerateResponse(msgspec.Struct):
    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(msgspec.Struct):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(msgspec.Struct, gc=False):
    """One event of a stream; text and details are null on all but the last."""

    index: int
    token: TokenBody
    top_tokens: list[TokenBody] | UnsetType = UNSET
    generated_text: str | None = None
    details: StreamDetails | None = None


class SimpleToken(msgspec.Struct):
    """A token of ``/tokenize``; ``start`` and ``stop`` are byte offsets into ``inputs``."""

    id: int
    text: str
    start: int
    stop: int


class Info(msgspec.Struct, kw_only=True):
    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
