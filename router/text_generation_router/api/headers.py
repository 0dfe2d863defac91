"""TGI's headers of answers."""

from __future__ import annotations

import re

from text_generation_router.api.reply import Headers
from text_generation_router.scheduling.requests import Finished


def header_value(text: str) -> bytes:
    """A text that can stand in a header: a line break in it would break every answer."""
    return re.sub(r"[^ -~]", "?", text).encode()


def stream_headers(compute_type: bytes, num_characters: int) -> Headers:
    """``num_characters`` of the prompt, here and below."""
    return (
        (b"content-type", b"text/event-stream"),
        (b"cache-control", b"no-cache"),
        (b"x-compute-type", compute_type),
        (b"x-compute-characters", b"%d" % num_characters),
        (b"x-accel-buffering", b"no"),
    )


def result_headers(
    compute_type: bytes,
    num_characters: int,
    finished: Finished,
    *,
    prompt_tokens: int,
    cached_tokens: int,
    total_s: float,
) -> Headers:
    """Of an answer in one piece. ``finished``: of all its generations."""
    timings = finished.timings
    return (
        (b"x-compute-type", compute_type),
        (b"x-compute-time", repr(total_s).encode()),
        (b"x-compute-characters", b"%d" % num_characters),
        (b"x-total-time", _milliseconds(total_s)),
        (b"x-validation-time", _milliseconds(timings.validation_s)),
        (b"x-queue-time", _milliseconds(timings.queue_s)),
        (b"x-inference-time", _milliseconds(timings.inference_s)),
        (b"x-time-per-token", _milliseconds(timings.per_token_s(finished.generated_tokens))),
        (b"x-prompt-tokens", b"%d" % prompt_tokens),
        (b"x-cached-tokens", b"%d" % cached_tokens),
        (b"x-generated-tokens", b"%d" % finished.generated_tokens),
    )


def embedding_headers(
    compute_type: bytes,
    num_characters: int,
    *,
    validation_s: float,
    inference_s: float,
    prompt_tokens: int,
    total_s: float,
) -> Headers:
    """Of vectors."""
    return (
        (b"x-compute-type", compute_type),
        (b"x-compute-time", repr(total_s).encode()),
        (b"x-compute-characters", b"%d" % num_characters),
        (b"x-total-time", _milliseconds(total_s)),
        (b"x-validation-time", _milliseconds(validation_s)),
        (b"x-inference-time", _milliseconds(inference_s)),
        (b"x-prompt-tokens", b"%d" % prompt_tokens),
    )


def _milliseconds(seconds: float) -> bytes:
    return b"%d" % (seconds * 1e3)
