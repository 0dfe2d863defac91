"""One answer, of one generation or several, whole or as a stream: asked for, counted, sent and recorded."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from starlette.types import Scope, Send

from text_generation_router.api.accounting import counted, record_success
from text_generation_router.api.caller import caller_of
from text_generation_router.api.openai.answers import Answers, Totals
from text_generation_router.api.openai.choices import Choices
from text_generation_router.api.reply import JSON, send_body
from text_generation_router.api.sse import EventStreamResponse, relay
from text_generation_router.errors import RouterError
from text_generation_router.generate_request import GenerateRequest
from text_generation_router.inference import Generation
from text_generation_router.scheduling.requests import Event

Batch = tuple[int, list[Event]]
"""Index of a generation, and what it has to say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """What is asked of the model, and how what it says is written."""

    requests: Sequence[GenerateRequest]
    num_copies: int = 1
    frames: Callable[[Batch], tuple[bytes, bool]]
    """The frames of a batch, and whether it was the last."""
    error_frame: Callable[[RouterError], bytes]


class Answering:
    """The answer to one HTTP request."""

    def __init__(self, answers: Answers, route: str, scope: Scope, send: Send) -> None:
        """``route``: its name in the log."""
        self.totals = Totals()
        """What the generations that have ended add up to."""
        self._answers = answers
        self._route = route
        self._scope = scope
        self._send = send
        self._started_at = time.perf_counter()
        self._requests: Sequence[GenerateRequest] = ()
        self._first: Generation | None = None

    def counted(self) -> AbstractContextManager[None]:
        """Around all that the model does for it."""
        return counted(self._answers.served.metrics, self._route)

    async def collect(
        self, requests: Sequence[GenerateRequest], num_copies: int, take: Callable[[int, list[Event]], object]
    ) -> None:
        """Run the requests to their ends. Raises: RouterError."""
        async with self._choices(requests, num_copies) as choices:
            await choices.start(requests, num_copies)
            while (batch := await choices.next()) is not None:
                self.totals.take(*batch)
                take(*batch)

    async def send_whole(self, body: bytes) -> None:
        """Record the success, and send the body of the answer."""
        total_s = self._record()
        headers = self._answers.headers(self._num_characters, self.totals, total_s)
        await send_body(self._send, body, JSON, headers=headers)

    async def stream(self, ask: Callable[[], Awaitable[Stream]], *, done: bytes = b"") -> None:
        """Ask, and write what comes. ``done`` stands behind the last event, whatever it is.

        Raises: RouterError before anything was sent; later errors are events.
        """
        response: EventStreamResponse | None = None
        stream: Stream | None = None
        try:
            with self.counted():
                stream = await ask()
                async with self._choices(stream.requests, stream.num_copies) as choices:
                    headers = self._answers.stream_headers(self._num_characters)
                    response = EventStreamResponse(self._scope, self._send, headers)
                    await choices.start(stream.requests, stream.num_copies)
                    self._first = choices.first

                    async def next_batch() -> Batch:
                        batch = await choices.next()
                        assert batch is not None, "the frames have told the end"
                        self.totals.take(*batch)
                        return batch

                    last = await relay(next_batch, stream.frames, response)
        except RouterError as error:
            if stream is None or response is None or not response.started:
                raise
            await response.end(stream.error_frame(error) + done)
            return
        self._record()
        # The permits are free by now: a client that asks again on reading the end is not refused on its own account.
        await response.end(last + done)

    @property
    def prompt_tokens(self) -> tuple[int, int]:
        """Of the first request of a stream: how many, and how many of these were cached. Known with the first event."""
        assert self._first is not None
        return self._first.prompt_tokens

    def _choices(self, requests: Sequence[GenerateRequest], num_copies: int) -> Choices:
        self._requests = requests
        self.totals.num_copies = num_copies
        return Choices(self._answers.inference, caller_of(self._scope))

    def _record(self) -> float:
        """Seconds that it took in all."""
        total_s = time.perf_counter() - self._started_at
        parameters = self._requests[0].parameters
        record_success(self._answers.served.metrics, self._route, parameters, self.totals.finished(), total_s)
        return total_s

    @property
    def _num_characters(self) -> int:
        return sum(len(request.inputs) for request in self._requests)
