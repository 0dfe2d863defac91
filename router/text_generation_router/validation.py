"""Pure: GenerateRequest + Limits + token ids -> ValidRequest, or a ValidationError with TGI's words.

The checks come in TGI's order, the first failure wins. Between the functions the caller does what costs:
``check_shape`` -> take a permit -> ``check_parameters`` -> ``check_length`` -> tokenise -> ``build_request``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from text_generation_proto.grammars import Grammar

from text_generation_router.config import Limits
from text_generation_router.errors import ValidationError
from text_generation_router.generate_request import (
    NO_MORE,
    NOBODY,
    Caller,
    GenerateParameters,
    GenerateRequest,
    MoreParameters,
)
from text_generation_router.guidance.formats import native_grammar
from text_generation_router.scheduling.requests import Sampling, ValidRequest

MAX_STOP_BYTES = 1024
"""Of a stop sequence: every token of an answer is compared with it."""

_F32 = struct.Struct("f")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedParameters:
    """A request that lacks only its token ids."""

    inputs: str
    add_special_tokens: bool
    sampling: Sampling
    """Its seed is filled in by ``build_request``."""
    seed: int | None
    max_new_tokens: int | None
    truncate: int | None
    stop_sequences: tuple[str, ...]
    top_n_tokens: int
    decoder_input_details: bool
    ignore_eos: bool = False
    grammar: Grammar | None = None
    """Still to be tried out."""
    prefill_top_n_tokens: int = 0
    embeds: bool = False
    priority: int | None = None
    """None: the caller's."""


def check_shape(request: GenerateRequest, limits: Limits, *, streaming: bool) -> None:
    """What is wrong with the kind of answer asked for, whatever the load: checked before a permit is taken.

    Raises: ValidationError.
    """
    parameters = request.parameters
    best_of = parameters.best_of
    if streaming:
        if best_of is not None and best_of != 1:
            raise ValidationError("`best_of` != 1 is not supported when streaming tokens")
        if parameters.decoder_input_details:
            raise ValidationError("`decoder_input_details` == true is not supported when streaming tokens")
    elif best_of is not None and best_of > 1:
        if limits.max_best_of == 1:
            raise ValidationError("`best_of` != 1 is not allowed for this endpoint")
        if best_of > limits.max_best_of:
            raise ValidationError(f"`best_of` must be > 0 and <= {limits.max_best_of}. Given: {best_of}")


def check_parameters(request: GenerateRequest, limits: Limits) -> CheckedParameters:
    """All that can be said without the prompt's tokens. Raises: ValidationError."""
    parameters = request.parameters
    best_of = max(parameters.best_of or 1, 1)
    sampling = _with_more(_check_sampling(parameters, best_of), request.more, limits)
    if parameters.max_new_tokens == 0:
        raise ValidationError("`max_new_tokens` must be strictly positive")
    num_stops = len(parameters.stop)
    if num_stops > limits.max_stop_sequences:
        raise ValidationError(f"`stop` supports up to {limits.max_stop_sequences} stop sequences. Given: {num_stops}")
    if any(len(stop.encode()) > MAX_STOP_BYTES for stop in parameters.stop):
        raise ValidationError(f"`stop` sequences may have {MAX_STOP_BYTES} bytes each")
    if parameters.seed is not None and best_of > 1:
        raise ValidationError("`seed` must not be set when `best_of` > 1")
    top_n_tokens = parameters.top_n_tokens or 0
    max_top_n_tokens = min(max(limits.max_top_n_tokens, request.more.max_top_n_tokens), limits.vocab_size)
    if top_n_tokens > max_top_n_tokens:
        raise ValidationError(f"`top_n_tokens` must be >= 0 and <= {max_top_n_tokens}. Given: {top_n_tokens}")
    if not request.inputs and request.input_ids is None:
        raise ValidationError("`inputs` cannot be empty")
    if request.input_ids is not None and max(request.input_ids, default=0) >= limits.vocab_size:
        raise ValidationError(f"token ids of a prompt must be less than {limits.vocab_size}")
    truncate = parameters.truncate
    if truncate is not None and not 0 < truncate <= limits.max_input_tokens:
        raise ValidationError(
            f"`truncate` must be strictly positive and less than {limits.max_input_tokens}. Given: {truncate}"
        )
    _refuse_missing_features(parameters)
    return CheckedParameters(
        inputs=request.inputs,
        add_special_tokens=request.add_special_tokens,
        sampling=sampling,
        seed=parameters.seed,
        max_new_tokens=parameters.max_new_tokens,
        truncate=truncate,
        stop_sequences=parameters.stop,
        top_n_tokens=top_n_tokens,
        decoder_input_details=parameters.decoder_input_details,
        ignore_eos=request.more.ignore_eos,
        grammar=_grammar(request, limits),
        prefill_top_n_tokens=request.more.prefill_top_n_tokens,
        embeds=request.more.embeds,
        priority=parameters.priority,
    )


def check_length(least_tokens: int, limits: Limits) -> None:
    """Refuse a prompt that is too long however it is tokenised. Raises: ValidationError."""
    if least_tokens > limits.max_input_tokens:
        raise ValidationError(
            f"`inputs` must have less than {limits.max_input_tokens} tokens. Given: at least {least_tokens}"
        )


def build_request(
    checked: CheckedParameters, input_ids: list[int], limits: Limits, *, seed: int, caller: Caller = NOBODY
) -> ValidRequest:
    """Cut the prompt to its last ``truncate`` ids and check the lengths. Raises: ValidationError."""
    if not input_ids:
        # A prompt may consist of characters that the tokenizer's normaliser removes.
        raise ValidationError("`inputs` cannot be empty")
    if checked.truncate is not None:
        input_ids = input_ids[-checked.truncate :]
    num_inputs = len(input_ids)
    max_new_tokens = checked.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = max(limits.max_total_tokens - num_inputs, 0)
    if num_inputs + max_new_tokens > limits.max_total_tokens:
        raise ValidationError(
            f"`inputs` tokens + `max_new_tokens` must be <= {limits.max_total_tokens}. "
            f"Given: {num_inputs} `inputs` tokens and {max_new_tokens} `max_new_tokens`"
        )
    if num_inputs > limits.max_input_tokens:
        raise ValidationError(f"`inputs` must have less than {limits.max_input_tokens} tokens. Given: {num_inputs}")
    return ValidRequest(
        inputs=checked.inputs,
        input_ids=input_ids,
        sampling=replace(checked.sampling, seed=seed),
        max_new_tokens=max_new_tokens,
        stop_sequences=checked.stop_sequences,
        top_n_tokens=checked.top_n_tokens,
        decoder_input_details=checked.decoder_input_details,
        ignore_eos=checked.ignore_eos,
        grammar=checked.grammar,
        traceparent=caller.traceparent,
        cache_salt=caller.tenant,
        tenant=caller.tenant,
        priority=caller.priority if checked.priority is None else checked.priority,
        prefill_top_n_tokens=checked.prefill_top_n_tokens,
        embeds=checked.embeds,
    )


def _check_sampling(parameters: GenerateParameters, best_of: int) -> Sampling:
    """Rows 1 to 7, on the 32-bit values that the shards compute with: 1e-60 is zero there, and 0.99999999999 is one."""
    given = (parameters.temperature, parameters.top_k, parameters.top_p, parameters.typical_p)
    if best_of > 1 and not parameters.do_sample and all(value is None for value in given):
        raise ValidationError("you must use sampling when `best_of` is > 1")
    temperature = _f32(parameters.temperature, 1.0)
    if temperature <= 0.0:
        raise ValidationError("`temperature` must be strictly positive")
    repetition_penalty = _f32(parameters.repetition_penalty, 1.0)
    if repetition_penalty <= 0.0:
        raise ValidationError("`repetition_penalty` must be strictly positive")
    frequency_penalty = _f32(parameters.frequency_penalty, 0.0)
    if not -2.0 <= frequency_penalty <= 2.0:
        raise ValidationError("`frequency_penalty` must be >= -2.0 and <= 2.0")
    top_p = _f32(parameters.top_p, 0.5)
    if not 0.0 < top_p < 1.0:
        raise ValidationError("`top_p` must be > 0.0 and < 1.0")
    typical_p = _f32(parameters.typical_p, 0.5)
    if not 0.0 < typical_p < 1.0:
        raise ValidationError("`typical_p` must be > 0.0 and < 1.0")
    top_k = parameters.top_k
    if top_k is not None and top_k <= 0:
        raise ValidationError("`top_k` must be strictly positive")
    narrowed = top_k is not None or parameters.top_p is not None or parameters.typical_p is not None
    return Sampling(
        temperature=temperature,
        top_k=top_k or 0,
        top_p=top_p if parameters.top_p is not None else 1.0,
        typical_p=typical_p if parameters.typical_p is not None else 1.0,
        repetition_penalty=repetition_penalty,
        frequency_penalty=frequency_penalty,
        watermark=parameters.watermark,
        # TGI samples as soon as one of these reshapes the distribution, `do_sample` or not.
        do_sample=parameters.do_sample or temperature != 1.0 or narrowed,
    )


def _with_more(sampling: Sampling, more: MoreParameters, limits: Limits) -> Sampling:
    """The rest of what a request can ask of sampling. Raises: ValidationError."""
    if more is NO_MORE:
        return sampling
    largest = max((token_id for token_id, _ in more.logit_bias), default=0)
    if largest >= limits.vocab_size:
        raise ValidationError(f"`logit_bias` has token {largest}, the model knows {limits.vocab_size} tokens")
    return replace(
        sampling,
        presence_penalty=_f32(more.presence_penalty, 0.0),
        count_penalty=_f32(more.count_penalty, 0.0),
        logit_bias=more.logit_bias,
        choice_index=more.choice_index,
    )


def _grammar(request: GenerateRequest, limits: Limits) -> Grammar | None:
    """The grammar of the answer: one that the route has put together, or the one of the request."""
    if request.more.grammar is None and request.parameters.grammar is None:
        return None
    if limits.disable_grammar_support:
        raise ValidationError("grammar is not supported")
    return request.more.grammar or native_grammar(request.parameters.grammar)


def _refuse_missing_features(parameters: GenerateParameters) -> None:
    """Fields of TGI that this version does not honour yet; false and null ask for nothing."""
    if parameters.adapter_id is not None:
        raise ValidationError("`adapter_id` is not supported yet")


def _f32(value: float | None, default: float) -> float:
    """The nearest 32-bit float. Schemas keep values in its range."""
    if value is None:
        return default
    (rounded,) = _F32.unpack(_F32.pack(value))
    return float(rounded)
