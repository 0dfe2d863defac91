"""A stream reads the same however the network cuts it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_generation_launcher.benchmark.sse import ProtocolError, SseReader

EVENTS = [b'{"index":1}', b"text with \xc3\xa9", b"[DONE]"]
STREAM = b"".join(b"data: " + event + b"\n\n" for event in EVENTS)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKS = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in (STREAM[:7], STREAM[7:]))

CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKS + b"0\r\n\r\n"
COUNTED = HEAD + f"content-length: {len(STREAM)}\r\n\r\n".encode() + STREAM
UNTIL_CLOSE = HEAD + b"connection: close\r\n\r\n" + STREAM


def read(parts: list[bytes]) -> tuple[list[bytes], SseReader]:
    reader = SseReader()
    return [event for part in parts for event in reader.feed(part)], reader


@pytest.mark.parametrize(
    ("response", "ends"),
    [
        pytest.param(CHUNKED, True, id="chunked transfer coding ends with the empty chunk"),
        pytest.param(COUNTED, True, id="a content length ends after as many bytes"),
        pytest.param(UNTIL_CLOSE, False, id="otherwise only the connection's end is the end"),
    ],
)
@given(cuts=st.lists(st.integers(0, 300)))
def test_cuts_do_not_matter(response: bytes, ends: bool, cuts: list[int]) -> None:
    edges = sorted({0, len(response), *(cut for cut in cuts if cut < len(response))})
    parts = [response[start:end] for start, end in pairwise(edges)]
    events, reader = read(parts)
    assert events == EVENTS
    assert reader.ended is ends


def test_comments_and_missing_spaces_are_read() -> None:
    events, _ = read([HEAD + b"\r\n:\n\ndata:{}\n\n: keep-alive\n\n"])
    assert events == [b"{}"]


def test_the_body_of_a_refusal_is_kept_whole() -> None:
    events, reader = read([b'HTTP/1.1 422 Unprocessable\r\ncontent-length: 13\r\n\r\n{"error":"x"}'])
    assert events == []
    assert (reader.status, bytes(reader.body), reader.ended) == (422, b'{"error":"x"}', True)


def test_something_else_than_http_is_an_error() -> None:
    with pytest.raises(ProtocolError):
        SseReader().feed(b"SSH-2.0\r\n\r\n")
