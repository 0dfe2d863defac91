"""Events -> frames: laws."""

from __future__ import annotations

import json
import math

from builders import queued
from hypothesis import given
from hypothesis import strategies as st
from scripted import finished
from text_generation_router.api.schemas import as_f32
from text_generation_router.api.sse import NativeFrames
from text_generation_router.scheduling.requests import Token, TokenEvent

tokens = st.builds(
    Token,
    id=st.integers(0, 2**32 - 1),
    text=st.text(),
    logprob=st.none() | st.floats(width=32),
    special=st.booleans(),
)


@given(st.lists(st.tuples(tokens, st.none() | st.lists(tokens, max_size=3)), min_size=1), st.booleans(), st.booleans())
def test_every_token_is_one_line_that_says_the_same(
    given_tokens: list[tuple[Token, list[Token] | None]], ends: bool, details: bool
) -> None:
    events = [TokenEvent(i, token, top) for i, (token, top) in enumerate(given_tokens, 1)]
    if ends:
        events[-1].finished = finished("text", len(events), queued(2))
    frames, ended = NativeFrames("> ", details=details)(events)
    assert ended == ends
    parts = frames.decode().split("\n\n")
    assert parts.pop() == ""
    assert len(parts) == len(events)
    for event, part in zip(events, parts, strict=True):
        assert part.startswith("data: {")
        assert "\n" not in part
        assert "\r" not in part
        said = json.loads(part[6:])
        assert said["index"] == event.index
        assert (said["token"]["id"], said["token"]["text"]) == (event.token.id, event.token.text)
        assert ("top_tokens" in said) == bool(event.top_tokens)
        is_last = event.finished is not None
        assert said["generated_text"] == ("> text" if is_last else None)
        assert (said["details"] is not None) == (is_last and details)


@given(st.floats(width=32))
def test_logprobs_keep_the_precision_of_a_32_bit_float(logprob: float) -> None:
    printed = as_f32(logprob)
    assert printed is not None
    if math.isfinite(logprob):
        assert math.isclose(printed, logprob, rel_tol=5e-7, abs_tol=1e-44)
    else:
        assert not math.isfinite(printed)
