"""How to ask each kind of server for an exact number of greedy tokens, and how to read its events."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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
    """A streaming route: how to ask it for `n` greedy tokens, and how to read its events."""

    path: str
    body: Callable[[str, int], dict[str, Any]]
    read: Callable[[dict[str, Any]], Piece]


def native_body(prompt: str, output_tokens: int) -> dict[str, Any]:
    parameters = {"max_new_tokens": output_tokens, "do_sample": False, "details": True}
    return {"inputs": prompt, "parameters": parameters}


def read_native(event: dict[str, Any]) -> Piece:
    if "error" in event:
        return Piece(error=str(event["error"]))
    details = event.get("details")
    usage = Usage(details["input_length"], details["generated_tokens"]) if details else None
    return Piece(has_token="token" in event, usage=usage)


def transformers_body(prompt: str, output_tokens: int) -> dict[str, Any]:
    """It refuses fields that it does not know and sends usage unasked."""
    return {"prompt": prompt, "max_tokens": output_tokens, "temperature": 0, "stream": True}


def completions_body(prompt: str, output_tokens: int) -> dict[str, Any]:
    exact_length = {"ignore_eos": True, "min_tokens": output_tokens, "stream_options": {"include_usage": True}}
    return transformers_body(prompt, output_tokens) | exact_length


def read_completions(event: dict[str, Any]) -> Piece:
    if event.get("error"):
        return Piece(error=str(event["error"]))
    choices, counts = event.get("choices") or [], event.get("usage")
    has_token = bool(choices) and (bool(choices[0]["text"]) or choices[0].get("finish_reason") is None)
    usage = Usage(counts["prompt_tokens"], counts["completion_tokens"]) if counts else None
    return Piece(has_token=has_token, usage=usage)


def llama_cpp_body(prompt: str, output_tokens: int) -> dict[str, Any]:
    """Greedy by the one sampler that is needed, of nine that run by default; only counts in the last event."""
    greedy = {"temperature": 0, "samplers": ["top_k"], "top_k": 1}
    counts = {"response_fields": ["stop", "tokens_evaluated", "tokens_predicted"]}
    exact_length = {"n_predict": output_tokens, "ignore_eos": True}
    return {"prompt": prompt, "stream": True, "cache_prompt": False, **exact_length, **greedy, **counts}


def read_llama_cpp(event: dict[str, Any]) -> Piece:
    """A token that leaves a character unfinished has no event of its own; it comes with the token that finishes it."""
    if "error" in event:
        return Piece(error=str(event["error"]))
    if event["stop"]:
        return Piece(usage=Usage(event["tokens_evaluated"], event["tokens_predicted"]))
    return Piece(has_token=True)


APIS = {
    "native": Api("/generate_stream", native_body, read_native),
    "completions": Api("/v1/completions", completions_body, read_completions),
    "transformers": Api("/v1/completions", transformers_body, read_completions),
    "llama.cpp": Api("/completion", llama_cpp_body, read_llama_cpp),
}
