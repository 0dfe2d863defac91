"""A request on its way through the router, and the events streamed back to it."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from text_generation_proto.grammars import Grammar

from text_generation_router.errors import RouterError

SUSPECT_CRASHES = 2
"""One may be an accident."""


class FinishReason(enum.StrEnum):
    LENGTH = "length"
    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen; neutral values switch a step off (see ``SamplingParameters`` in the contract)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    do_sample: bool = False
    seed: int = 0
    choice_index: int = 0
    presence_penalty: float = 0.0
    """Of a token that was generated."""
    count_penalty: float = 0.0
    """For each time a token was generated: OpenAI's frequency penalty."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Distinct token ids, and what is added to the logit of each."""
    watermark: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidRequest:
    """A request with nothing left to doubt: checked, tokenised, defaults filled in."""

    inputs: str
    """The prompt as sent, or as rendered by the chat template."""
    input_ids: list[int]
    """Prompt token ids after truncation, special tokens included; at least one."""
    sampling: Sampling
    max_new_tokens: int
    stop_sequences: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_n_tokens: int = 0
    decoder_input_details: bool = False
    """Report the prompt's tokens, with logprobs when the server was started with them."""
    prefill_top_n_tokens: int = 0
    """And so many of the most likely tokens in the place of each."""
    traceparent: str = ""
    grammar: Grammar | None = None
    """What the output has to obey; it compiles."""
    cache_salt: bytes = b""
    """Only requests of one salt share computed prompts."""
    embeds: bool = False
    """Report the mean of the prompt's last hidden states with its one token."""
    tenant: bytes = b""
    """Whom its tokens are counted for: requests of one tenant share their part of the server."""
    priority: int = 0
    """Among those of its tenant; the largest is first."""

    @property
    def reads_whole_prompt(self) -> bool:
        """Whether something is wanted of every token of the prompt, which the prefix cache does not hold."""
        return self.decoder_input_details or self.embeds


class Token(msgspec.Struct, gc=False):
    """One and its event come for every token of every stream: as structs they take a quarter of a dataclass's time to
    make, and Python's collector has nothing to look at."""

    id: int
    text: str
    logprob: float | None
    special: bool


@dataclass(slots=True)
class PrefillToken:
    id: int
    text: str
    logprob: float | None
    """None for the first token of a prompt, which has no probability."""
    top: Sequence[tuple[int, float]] = ()
    """Ids and logprobs of the most likely tokens in its place, where these were wanted."""


@dataclass(frozen=True, slots=True)
class RequestTimings:
    """Durations of one generation in seconds."""

    validation_s: float
    queue_s: float
    """From the queue's door to the first step that computes the request."""
    inference_s: float
    """From that first step to the last token."""
    total_s: float

    def per_token_s(self, generated_tokens: int) -> float:
        return self.inference_s / max(generated_tokens, 1)


@dataclass(slots=True)
class Finished:
    """What only the last event of a generation carries."""

    generated_text: str
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    """None when the tokens were chosen greedily."""
    input_length: int
    cached_tokens: int
    """Of the prompt; they were taken from the prefix cache."""
    timings: RequestTimings


class TokenEvent(msgspec.Struct, gc=False):
    """One generated token; the last one carries ``finished``."""

    index: int
    """Counts from 1."""
    token: Token
    top_tokens: list[Token] | None
    finished: Finished | None = None


@dataclass(slots=True)
class PrefillEvent:
    """The prompt's tokens; comes before the first token event, only when asked for."""

    tokens: list[PrefillToken]


Event = TokenEvent | PrefillEvent


class EventStream:
    """Hands the events of one generation from the batching loop to the one task that answers the client.

    Unbounded, but a generation has a bounded number of events. Single producer, single consumer, one event loop.
    """

    __slots__ = ("_closed", "_error", "_events", "_waiter")

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: RouterError | None = None
        self._closed = False

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    def fail(self, error: RouterError) -> None:
        """End the stream with an error, behind the events already put."""
        if not self._closed:
            self._error = error
            self._closed = True
            self._wake()

    def close(self) -> None:
        """End the stream; the last event was put."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get_all(self) -> list[Event]:
        """All events that are there, waiting for one if there is none; an empty list once the stream has ended.

        Raises: the error the stream ended with, after its events were handed out.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._closed:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._events = self._events, []
        return events


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A valid request waiting for, or taking part in, batches; its ids are the token log that can be replayed."""

    request: ValidRequest
    validation_s: float
    is_part: bool = False
    """Of a request that was let in as a whole."""
    stream: EventStream = field(default_factory=EventStream)
    output_ids: list[int] = field(default_factory=list)
    enqueued_at: float = field(default_factory=time.perf_counter)
    started_at: float | None = None
    """When the first step that computes it was sent."""
    num_cached_tokens: int = 0
    """Prompt tokens that were taken from the prefix cache on the way to the first token."""
    embedding: bytes = b""
    """Float32, little endian, once there is a token; of a request that embeds."""
    is_charged: bool = False
    """Whether its prompt was counted for its tenant: computing it again is not what it asked for."""
    num_crashes: int = 0
    """How often the shards failed while they computed it, since it was last computed alone."""

    @property
    def is_suspect(self) -> bool:
        """Whether it may be the one that makes the shards fail: it is computed alone until it has shown otherwise."""
        return self.num_crashes >= SUSPECT_CRASHES

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.input_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.request.input_ids) + len(self.output_ids)
