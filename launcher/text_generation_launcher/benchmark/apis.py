"""How to ask each kind of server for a number of tokens, and how to read its events."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from text_generation_launcher.benchmark.config import GREEDY, ApiName, Sampling
from text_generation_launcher.benchmark.errors import BenchmarkError


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event says."""

    has_token: bool = False
    usage: Usage | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Api:
    """A streaming route: how to ask it for `n` tokens, and how to read its events."""

    path: str
    body: Callable[[str, int], dict[str, Any]]
    read: Callable[[dict[str, Any]], Piece]


class Extras(enum.Enum):
    """Fields beside OpenAI's oldest ones; a strict server refuses a whole request for one that it does not know."""

    EXACT_LENGTH = "go on behind the end of the sequence; count the tokens"
    USAGE = "count the tokens"
    NONE = "nothing"


def native(sampling: Sampling = GREEDY) -> Api:
    """TGI's own route. It has no field to go on behind the end of a sequence."""
    names = ("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "frequency_penalty", "top_n_tokens")
    chosen = {name: value for name in names if (value := getattr(sampling, name)) is not None}
    if sampling.watermark:
        chosen["watermark"] = True

    def body(prompt: str, output_tokens: int) -> dict[str, Any]:
        asked = {"max_new_tokens": output_tokens, "do_sample": sampling.samples, "details": True}
        return {"inputs": prompt, "parameters": asked | chosen}

    return Api("/generate_stream", body, read_native)


def completions(model: str | None = None, sampling: Sampling = GREEDY, extras: Extras = Extras.EXACT_LENGTH) -> Api:
    """OpenAI's older route. Raises: BenchmarkError, as below."""
    fields = _openai_fields(model, sampling, extras)
    if sampling.top_n_tokens is not None:
        fields["logprobs"] = sampling.top_n_tokens

    def body(prompt: str, output_tokens: int) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": output_tokens, **fields, **_length(output_tokens, extras)}

    return Api("/v1/completions", body, read_openai)


def chat(model: str | None = None, sampling: Sampling = GREEDY, extras: Extras = Extras.EXACT_LENGTH) -> Api:
    """OpenAI's chat, with the prompt as the one message. Raises: BenchmarkError, as below."""
    fields = _openai_fields(model, sampling, extras)
    if sampling.top_n_tokens is not None:
        fields |= {"logprobs": True, "top_logprobs": sampling.top_n_tokens}

    def body(prompt: str, output_tokens: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        return {"messages": messages, "max_tokens": output_tokens, **fields, **_length(output_tokens, extras)}

    return Api("/v1/chat/completions", body, read_openai)


OPENAI = {ApiName.COMPLETIONS: completions, ApiName.CHAT: chat}


def _openai_fields(model: str | None, sampling: Sampling, extras: Extras) -> dict[str, Any]:
    """Raises: BenchmarkError for a parameter that OpenAI's API does not have."""
    for name in ("top_k", "typical_p", "repetition_penalty", "watermark"):
        if getattr(sampling, name):
            raise BenchmarkError(
                f"`--{name.replace('_', '-')}` is no parameter of OpenAI's API, which this server is measured by; "
                "leave it out"
            )
    fields: dict[str, Any] = {} if model is None else {"model": model}
    fields["temperature"] = (sampling.temperature or 1.0) if sampling.samples else 0
    for name in ("top_p", "frequency_penalty"):
        if (value := getattr(sampling, name)) is not None:
            fields[name] = value
    fields["stream"] = True
    if extras is not Extras.NONE:
        fields["stream_options"] = {"include_usage": True}
    return fields


def _length(output_tokens: int, extras: Extras) -> dict[str, Any]:
    return {"ignore_eos": True, "min_tokens": output_tokens} if extras is Extras.EXACT_LENGTH else {}


def read_native(event: dict[str, Any]) -> Piece:
    if "error" in event:
        return Piece(error=str(event["error"]))
    details = event.get("details")
    # TGI's own servers do not all have `input_length`.
    usage = Usage(details.get("input_length", 0), details["generated_tokens"]) if details else None
    return Piece(has_token="token" in event, usage=usage)


def read_openai(event: dict[str, Any]) -> Piece:
    if event.get("error"):
        return Piece(error=str(event["error"]))
    choices, counts = event.get("choices") or [], event.get("usage")
    has_token = bool(choices) and _has_token(choices[0])
    usage = Usage(counts["prompt_tokens"], counts["completion_tokens"]) if counts else None
    return Piece(has_token=has_token, usage=usage)


def _has_token(choice: dict[str, Any]) -> bool:
    """A token without text is a token, but the first event of a chat that only tells the role is none."""
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text")) or choice.get("finish_reason") is None
    if delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"):
        return True
    return choice.get("finish_reason") is None and "role" not in delta
