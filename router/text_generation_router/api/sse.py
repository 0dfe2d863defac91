"""Events of a generation -> text/event-stream, written to the connection without a layer in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec
from starlette.types import Scope, Send

from text_generation_router.api.disconnect import ClientGone
from text_generation_router.api.reply import Headers
from text_generation_router.api.schemas import StreamDetails, StreamResponse, token_body
from text_generation_router.errors import IncompleteGeneration, IncompleteGenerationStream, RouterError, error_body
from text_generation_router.http_protocol import WRITE_STALL_S
from text_generation_router.scheduling.requests import Event, Finished, PrefillEvent

KEEP_ALIVE_S = 15.0
"""Silence after which a comment is sent, so that no proxy takes the connection for dead."""
FIRST_EVENT_S = 10.0
"""How long the status line waits for the first token, in order to carry the status of a failure."""
PIECE_BYTES = 64 * 1024
"""Written at once, at most: what has piled up for a slow client takes longer than it may be silent for."""

KEEP_ALIVE = b":\n\n"

Batch = TypeVar("Batch")

_encode = msgspec.json.Encoder().encode


def frame(payload: object) -> bytes:
    """One event with a JSON body; nothing else is ever named in an event."""
    return b"data: " + _encode(payload) + b"\n\n"


def error_frame(error: RouterError) -> bytes:
    return frame(error_body(error))


class EventStreamResponse:
    """A response whose body is written event by event, with comments in between when nothing comes."""

    def __init__(self, scope: Scope, send: Send, headers: Headers) -> None:
        self.started = False
        self._send = send
        self._send_event: Send = scope.get("state", {}).get("send", send)
        """Past the layers that look at the start of a response: a token has a microsecond for each."""
        self._headers = headers
        self._written_at = 0.0
        self._num_writing = 0

    async def start(self) -> None:
        """Send the status line and the headers, if they were not sent yet."""
        if not self.started:
            self.started = True
            self._written_at = time.monotonic()
            await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})

    async def write(self, frames: bytes) -> None:
        self._num_writing += 1
        for piece in _pieces(frames):
            self._written_at = time.monotonic()
            await self._send_event({"type": "http.response.body", "body": piece, "more_body": True})
        self._num_writing -= 1

    async def end(self, frames: bytes) -> None:
        """Send the last events; the connection is free for the next request. Raises: ClientGone."""
        *pieces, last = _pieces(frames)
        try:
            for piece in pieces:
                async with asyncio.timeout(WRITE_STALL_S):
                    await self._send_event({"type": "http.response.body", "body": piece, "more_body": True})
            async with asyncio.timeout(WRITE_STALL_S):
                await self._send({"type": "http.response.body", "body": last, "more_body": False})
        except TimeoutError:
            raise ClientGone from None

    @asynccontextmanager
    async def attended(self) -> AsyncIterator[None]:
        """While inside: keep a silent stream alive, and raise ClientGone in the body when the client stops reading."""
        try:
            async with asyncio.timeout(None) as limit:
                attendant = asyncio.create_task(self._attend(limit))
                try:
                    yield
                finally:
                    attendant.cancel()
        except TimeoutError:
            if limit.expired():
                raise ClientGone from None
            raise

    async def _attend(self, limit: asyncio.Timeout) -> None:
        while True:
            patience = WRITE_STALL_S if self._num_writing else KEEP_ALIVE_S
            rest = self._written_at + patience - time.monotonic()
            if rest > 0:
                # A write that blocks meanwhile is judged by its own limit at the next look.
                await asyncio.sleep(min(rest, KEEP_ALIVE_S))
            elif self._num_writing:
                limit.reschedule(asyncio.get_running_loop().time())
                return
            else:
                try:
                    async with asyncio.timeout(WRITE_STALL_S):  # nobody watches over a comment but itself
                        await self.write(KEEP_ALIVE)
                except TimeoutError:
                    limit.reschedule(asyncio.get_running_loop().time())
                    return


def _pieces(frames: bytes) -> list[bytes]:
    if len(frames) <= PIECE_BYTES:
        return [frames]
    return [frames[first : first + PIECE_BYTES] for first in range(0, len(frames), PIECE_BYTES)]


async def relay(
    next_batch: Callable[[], Awaitable[Batch]],
    to_frames: Callable[[Batch], tuple[bytes, bool]],
    response: EventStreamResponse,
) -> bytes:
    """Write events as they come, all but the last batch of them; returns the frames of that.

    ``to_frames`` says whether a batch was the last. The status line waits for the first one, so a generation that fails
    at once raises before anything was sent.
    Raises: RouterError, ClientGone.
    """
    first = asyncio.ensure_future(next_batch())
    try:
        await asyncio.wait((first,), timeout=FIRST_EVENT_S)
        if not first.done():
            await response.start()
            await response.write(KEEP_ALIVE)
        elif first.exception() is None:
            await response.start()
        async with response.attended():
            batch = await first
            while True:
                frames, ended = to_frames(batch)
                if ended:
                    return frames
                if frames:
                    await response.write(frames)
                batch = await next_batch()
    except IncompleteGeneration:
        raise IncompleteGenerationStream from None
    finally:
        first.cancel()


class NativeFrames:
    """Events -> frames of TGI's native streams, one for each token."""

    def __init__(self, prefix: str = "", *, details: bool = False) -> None:
        """``prefix`` goes before the whole text in the last event, ``details`` asks for its details."""
        self.finished: Finished | None = None
        """What the last event said."""
        self._prefix = prefix
        self._details = details

    def __call__(self, events: Sequence[Event]) -> tuple[bytes, bool]:
        """Their frames in one piece, and whether the end of the generation is among them."""
        frames: list[bytes] = []
        for event in events:
            if isinstance(event, PrefillEvent):
                continue  # a stream never asks for it
            response = StreamResponse(event.index, token_body(event.token))
            if event.top_tokens:
                response.top_tokens = [token_body(token) for token in event.top_tokens]
            finished = event.finished
            if finished is not None:
                self.finished = finished
                response.generated_text = self._prefix + finished.generated_text
                if self._details:
                    response.details = StreamDetails(
                        finish_reason=finished.finish_reason.value,
                        generated_tokens=finished.generated_tokens,
                        seed=finished.seed,
                        input_length=finished.input_length,
                    )
            frames.append(frame(response))
        return b"".join(frames), self.finished is not None
