"""OpenAI's fields -> what the model is asked, or a refusal with the field's name. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import msgspec

from text_generation_router.api.openai.schemas import ChatBody, CompletionBody, SamplingFields
from text_generation_router.errors import BatchTooLarge, SuffixUnsupported, ValidationError
from text_generation_router.generate_request import GenerateParameters, MoreParameters

MAX_CHOICES = 128
"""OpenAI's limit of ``n``."""
MAX_TOP_LOGPROBS = 20
"""OpenAI's; TGI's clients are used to 5, and a server may be told to allow more."""
MAX_BIAS = 100.0
MAX_BIASES = 1024

REFUSED = {
    "audio": "this model writes text",
    "functions": "use `tools`",
    "function_call": "use `tool_choice`",
    "prediction": "outputs are not predicted here",
    "web_search_options": "this server searches nothing",
    "moderation": "nothing is moderated here",
}
"""Fields of a chat that mean something and are not there."""
NOT_HERE = {
    "min_p": "use `top_p`, `top_k` or `typical_p`",
    "min_tokens": "use `ignore_eos`, which goes on to `max_tokens`",
    "stop_token_ids": "use `stop`",
    "bad_words": "use `logit_bias`",
    "allowed_token_ids": "use `logit_bias`, or a grammar",
    "use_beam_search": "use `n`",
    "structured_outputs": "use `response_format`",
    "guided_json": "use `response_format`",
    "guided_regex": "use `response_format`",
    "guided_choice": "use `response_format`",
    "guided_grammar": "use `response_format`",
    "grammar": "use `response_format`",
}
"""What other servers, or TGI's own routes, add to OpenAI's fields, and an answer would depend on."""


def refuse(body: msgspec.Struct, reasons: Mapping[str, str]) -> None:
    """Fields that are not honoured, by name and why; what they say by default passes. Raises: ValidationError."""
    for name, reason in reasons.items():
        if getattr(body, name):
            raise ValidationError(f"`{name}` is not supported: {reason}")


def parameters_of(
    body: SamplingFields, *, max_tokens: int | None, top_n_tokens: int, details: bool
) -> tuple[GenerateParameters, MoreParameters]:
    """What chat and completions have in common. Raises: ValidationError."""
    greedy = body.temperature is not None and body.temperature == 0
    for name in ("frequency_penalty", "presence_penalty"):
        value = getattr(body, name)
        if value is not None and not -2 <= value <= 2:
            raise ValidationError(f"`{name}` must be >= -2.0 and <= 2.0")
    if body.top_p is not None and not 0 <= body.top_p <= 1:
        raise ValidationError("`top_p` must be >= 0.0 and <= 1.0")
    if body.n is not None and not 0 < body.n <= MAX_CHOICES:
        raise ValidationError(f"`n` must be > 0 and <= {MAX_CHOICES}. Given: {body.n}")
    refuse(body, NOT_HERE)
    if body.stream_options is not None:
        _check_stream_options(body)
    top_k, top_p = body.top_k, body.top_p
    if top_p == 0 and not greedy:
        top_k, top_p = 1, None  # the smallest set there is
    if top_k in (0, -1):  # how other servers switch it off
        top_k = None
    parameters = GenerateParameters(
        temperature=None if greedy else body.temperature,
        top_p=None if greedy or top_p in (None, 1.0) else top_p,
        top_k=None if greedy else top_k,
        typical_p=None if greedy or body.typical_p == 1.0 else body.typical_p,
        repetition_penalty=body.repetition_penalty or None,
        do_sample=not greedy,
        max_new_tokens=max_tokens,
        stop=_stops(body.stop),
        details=True,
        seed=None if body.seed is None else body.seed % 2**64,
        top_n_tokens=top_n_tokens,
        decoder_input_details=details,
        priority=body.priority,
    )
    more = MoreParameters(
        presence_penalty=body.presence_penalty or 0.0,
        count_penalty=body.frequency_penalty or 0.0,
        logit_bias=_biases(body),
        ignore_eos=bool(body.ignore_eos),
        max_top_n_tokens=MAX_TOP_LOGPROBS,
    )
    return parameters, more


def chat_parameters(body: ChatBody) -> tuple[GenerateParameters, MoreParameters]:
    """Raises: ValidationError."""
    for name, reason in REFUSED.items():
        if getattr(body, name) is not None:
            raise ValidationError(f"`{name}` is not supported: {reason}")
    if body.store:
        raise ValidationError("`store` is not supported: nothing is kept here")
    if body.service_tier not in (None, "auto", "default"):
        raise ValidationError(f"`service_tier` {body.service_tier} is not supported: there is one for all")
    if body.modalities not in (None, ["text"]):
        raise ValidationError("`modalities` other than text are not supported")
    if body.verbosity not in (None, "medium"):
        raise ValidationError("`verbosity` is not supported: say in a message how long the answer should be")
    if body.tools is None and body.parallel_tool_calls is not None:
        raise ValidationError("`parallel_tool_calls` is only allowed with `tools`")
    if body.top_logprobs and not body.logprobs:
        raise ValidationError("`top_logprobs` is only allowed with `logprobs` true")
    if body.top_logprobs is not None and body.top_logprobs > MAX_TOP_LOGPROBS:
        raise ValidationError(f"`top_logprobs` must be >= 0 and <= {MAX_TOP_LOGPROBS}. Given: {body.top_logprobs}")
    if body.best_of not in (None, 1):
        raise ValidationError("`best_of` is not supported: use `n`")
    both = body.max_tokens is not None and body.max_completion_tokens is not None
    if both and body.max_tokens != body.max_completion_tokens:
        raise ValidationError("`max_tokens` and `max_completion_tokens` are two names of one field and differ")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return parameters_of(body, max_tokens=max_tokens, top_n_tokens=body.top_logprobs or 0, details=False)


def completion_parameters(body: CompletionBody) -> tuple[GenerateParameters, MoreParameters]:
    """Raises: ValidationError, SuffixUnsupported."""
    if body.suffix is not None:
        raise SuffixUnsupported
    choices = body.n or 1
    if body.best_of is not None and body.best_of != choices:
        if body.best_of < choices:
            raise ValidationError(f"`best_of` must be >= `n`. Given: {body.best_of} and {choices}")
        if body.stream:
            raise ValidationError("`best_of` > `n` is not supported when streaming tokens")
        if body.best_of > MAX_CHOICES:
            raise ValidationError(f"`best_of` must be > 0 and <= {MAX_CHOICES}. Given: {body.best_of}")
    if body.logprobs is not None and body.logprobs > MAX_TOP_LOGPROBS:
        raise ValidationError(f"`logprobs` must be >= 0 and <= {MAX_TOP_LOGPROBS}. Given: {body.logprobs}")
    wants_prompt = bool(body.echo) and body.logprobs is not None
    if wants_prompt and body.stream:
        raise ValidationError("`echo` with `logprobs` is not supported when streaming tokens")
    top_n_tokens = body.logprobs or 0
    parameters, more = parameters_of(body, max_tokens=body.max_tokens, top_n_tokens=top_n_tokens, details=wants_prompt)
    if wants_prompt:
        more = msgspec.structs.replace(more, prefill_top_n_tokens=top_n_tokens)
    return parameters, more


def _check_stream_options(body: SamplingFields) -> None:
    assert body.stream_options is not None
    if body.stream_options.include_obfuscation:
        raise ValidationError("`include_obfuscation` is not supported")
    if body.stream_options.continuous_usage_stats:
        raise ValidationError("`continuous_usage_stats` is not supported")


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in stops:
        raise ValidationError("`stop` must not be an empty string")
    return stops


def _biases(body: SamplingFields) -> tuple[tuple[int, float], ...]:
    given = body.logit_bias
    if not given:
        return ()
    if isinstance(given, list):
        # TGI's schema says a list and its server never looked at it.
        raise ValidationError("`logit_bias` must be a map from token ids to numbers")
    if len(given) > MAX_BIASES:
        raise ValidationError(f"`logit_bias` may name {MAX_BIASES} tokens at most. Given: {len(given)}")
    biases: dict[int, float] = {}
    for name, bias in given.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise ValidationError(f"`logit_bias` must be a map from token ids to numbers. Given: {name[:20]!r}")
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise ValidationError(f"`logit_bias` must be >= -{MAX_BIAS:g} and <= {MAX_BIAS:g}. Given: {bias:g}")
        biases[int(name)] = bias
    return tuple(biases.items())


def prompts_of(prompt: str | list[str | int | list[int]], most: int) -> list[str | tuple[int, ...]]:
    """The prompts of a completion, ``most`` of them: texts, or ids. Raises: ValidationError, BatchTooLarge."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ValidationError("Empty array detected. Do not use an empty array for the prompt.")
    if not isinstance(prompt[0], int) and len(prompt) > most:
        raise BatchTooLarge(most)  # before each of them is looked at
    if len({type(each) for each in prompt}) > 1:
        raise ValidationError("`prompt` must be a string, token ids, or an array of one kind of them")
    if isinstance(prompt[0], int):
        return [tuple(cast(list[int], prompt))]
    return [tuple(each) if isinstance(each, list) else str(each) for each in prompt]
