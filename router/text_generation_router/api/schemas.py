"""Bodies of the native routes, as they are sent and as they are answered.

Requests are decoded strictly, as serde does for TGI: no number from a string or a boolean, no integer from 1.0, no
NaN, no null where a field is not optional; unknown fields are ignored. The order of response fields is TGI's.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from text_generation_router.scheduling.requests import Token

_F32_MAX = 3.4028234663852886e38
_U64_MAX = 2**64 - 1

U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
I32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
U64 = Annotated[int, Meta(ge=0)]
"""The upper bound is checked in ``__post_init__``: a bound in ``Meta`` must fit into a signed 64-bit integer."""
F32 = Annotated[float, Meta(ge=-_F32_MAX, le=_F32_MAX)]


class GenerateParameters(msgspec.Struct, frozen=True, kw_only=True):
    """``parameters`` of a request. None is "not given"; ranges that need the limits are checked in `validation`."""

    best_of: U64 | None = None
    temperature: F32 | None = None
    repetition_penalty: F32 | None = None
    frequency_penalty: F32 | None = None
    top_k: I32 | None = None
    top_p: F32 | None = None
    typical_p: F32 | None = None
    do_sample: bool = False
    max_new_tokens: U32 | None = None
    return_full_text: bool | None = None
    stop: tuple[str, ...] = ()
    truncate: U64 | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: U64 | None = None
    top_n_tokens: U32 | None = None
    grammar: Any = None
    adapter_id: str | None = None

    def __post_init__(self) -> None:
        for name in ("best_of", "truncate", "seed"):
            value = getattr(self, name)
            if value is not None and value > _U64_MAX:
                raise ValueError(f"Expected `int` <= {_U64_MAX} for `{name}`")


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


class GenerateRequest(msgspec.Struct, frozen=True):
    """What every generating route asks of the router, whatever its body looks like."""

    inputs: str
    parameters: GenerateParameters
    add_special_tokens: bool = True
    """False when a chat template has put them in already. Never read from a native body."""


# ---------------------------------------------------------------------------------------------------


class TokenBody(msgspec.Struct):
    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillTokenBody(msgspec.Struct):
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


class StreamResponse(msgspec.Struct):
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
