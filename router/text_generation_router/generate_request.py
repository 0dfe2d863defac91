"""What every generating route asks for, whatever its body looks like.

Decoded strictly, as serde does for TGI: no number from a string or a boolean, no integer from 1.0, no NaN, no null
where a field is not optional.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta
from text_generation_proto.grammars import Grammar

_F32_MAX = 3.4028234663852886e38
_U64_MAX = 2**64 - 1

U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
I32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
U64 = Annotated[int, Meta(ge=0)]
"""The upper bound is checked in ``__post_init__``: a bound in ``Meta`` must fit into a signed 64-bit integer."""
F32 = Annotated[float, Meta(ge=-_F32_MAX, le=_F32_MAX)]


ShortText = Annotated[str, Meta(max_length=256)]
"""Names and labels: what is compared, remembered or quoted in an error."""

MAX_PRIORITY = 10
Priority = Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
"""Among the requests of one API key; 0 is that of all who say none."""


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
    adapter_id: ShortText | None = None
    priority: Priority | None = None

    def __post_init__(self) -> None:
        for name in ("best_of", "truncate", "seed"):
            value = getattr(self, name)
            if value is not None and value > _U64_MAX:
                raise ValueError(f"Expected `int` <= {_U64_MAX} for `{name}`")


class Caller(msgspec.Struct, frozen=True):
    """What comes with a request beside its body."""

    traceparent: str = ""
    """W3C trace context, empty when there is none."""
    tenant: bytes = b""
    """Who it is, by its API key: a digest, empty for nobody. Only callers that are one share computed prompts."""
    priority: int = 0
    """Where the body says none."""
    timeout_s: float | None = None
    """Whatever is not answered by then is not wanted any more."""
    asked_at: float = 0.0
    """When that time began, by `time.perf_counter`."""


NOBODY = Caller()


class MoreParameters(msgspec.Struct, frozen=True, kw_only=True):
    """What routes other than TGI's can ask for on top."""

    presence_penalty: float = 0.0
    count_penalty: float = 0.0
    """OpenAI's frequency penalty: for each time a token was generated."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, and what is added to the logit of each."""
    choice_index: int = 0
    """Among several answers to one request, which with one seed are several all the same."""
    ignore_eos: bool = False
    grammar: Grammar | None = None
    """What the answer has to obey, where the route has its own ways to say so."""
    max_top_n_tokens: int = 0
    """Where the route allows more than ``--max-top-n-tokens``."""
    prefill_top_n_tokens: int = 0
    """The most likely tokens in the place of each of the prompt, with ``decoder_input_details``."""
    embeds: bool = False
    """The mean of the prompt's last hidden states is wanted, not what follows."""


NO_MORE = MoreParameters()


class GenerateRequest(msgspec.Struct, frozen=True):
    """What every generating route asks of the router, whatever its body looks like."""

    inputs: str
    parameters: GenerateParameters
    add_special_tokens: bool = True
    """False when a chat template has put them in already. Never read from a native body."""
    more: MoreParameters = NO_MORE
    input_ids: tuple[int, ...] | None = None
    """The prompt, where it was sent as ids; ``inputs`` is their text then."""
