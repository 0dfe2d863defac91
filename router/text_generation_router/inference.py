"""The one door to the model: permit -> validate -> enqueue -> stream of events."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from text_generation_router.admission import Admission, Permit, in_time, left_s
from text_generation_router.config import Limits
from text_generation_router.errors import (
    DeadlineExceeded,
    IncompleteGeneration,
    RouterError,
    first_of,
)
from text_generation_router.generate_request import NOBODY, Caller, GenerateRequest
from text_generation_router.guidance.guidance import Guidance
from text_generation_router.metrics import Metrics
from text_generation_router.scheduling.batcher import Batcher
from text_generation_router.scheduling.requests import (
    Event,
    Finished,
    PrefillEvent,
    PrefillToken,
    QueuedRequest,
    RequestTimings,
    Token,
    ValidRequest,
)
from text_generation_router.tokenizer import RouterTokenizer
from text_generation_router.validation import build_request, check_length, check_parameters, check_shape


@dataclass(slots=True)
class Choice:
    """One whole generation."""

    finished: Finished
    tokens: list[Token]
    prefill: list[PrefillToken] = field(default_factory=list)
    top_tokens: list[list[Token]] = field(default_factory=list)
    """One list for each token when they were asked for, else empty."""

    def mean_logprob(self) -> float:
        """What `best_of` compares."""
        return sum(token.logprob or 0.0 for token in self.tokens) / max(len(self.tokens), 1)


@dataclass(slots=True)
class GenerationResult:
    """The answer to a request that is not streamed."""

    inputs: str
    best: Choice
    others: list[Choice]
    timings: RequestTimings
    prompt_tokens: int
    generated_tokens: int


class Generation:
    """One running generation. Leaving the context cancels what still runs and returns the permit."""

    def __init__(
        self, queued: QueuedRequest, batcher: Batcher, permit: Permit, deadline: asyncio.TimerHandle | None = None
    ) -> None:
        self.inputs = queued.request.inputs
        self._deadline = deadline
        self._queued = queued
        self._batcher = batcher
        self._permit = permit
        self._finished = False

    async def next_events(self) -> list[Event]:
        """All events that are there, at least one; an empty list once the last one was handed out.

        Raises: RouterError when the generation failed, IncompleteGeneration when it ended without its last token.
        """
        events = await self._queued.stream.get_all()
        if not events and not self._finished:
            raise IncompleteGeneration()
        if events and not isinstance(events[-1], PrefillEvent) and events[-1].finished is not None:
            self._finished = True
        return events

    @property
    def prompt_tokens(self) -> tuple[int, int]:
        """How many, and how many of these the prefix cache had, as far as is known before the first event: none."""
        return self._queued.num_prompt_tokens, self._queued.num_cached_tokens

    @property
    def embedding(self) -> bytes:
        """Float32, little endian; of a request that embeds, once it has ended."""
        return self._queued.embedding

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what still runs and return the permit; twice is harmless."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._batcher.cancel(self._queued)
        self._permit.release()


class Inference:
    def __init__(
        self,
        batcher: Batcher,
        tokenizer: RouterTokenizer,
        limits: Limits,
        metrics: Metrics,
        guidance: Guidance,
        admission: Admission,
    ) -> None:
        self.limits = limits
        self.admission = admission
        self._batcher = batcher
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._guidance = guidance

    def drain(self) -> None:
        """Take nothing new. What runs may finish."""
        self.admission.drain()

    def give_up(self) -> None:
        """No shard will be started again: what waits for one fails."""
        self._batcher.give_up()

    def ready(self) -> bool:
        """Whether a request sent now would be served: the shards make progress and nothing drains."""
        return not self.admission.draining and self._batcher.ready()

    async def stream(self, request: GenerateRequest, caller: Caller = NOBODY) -> Generation:
        """Start a generation whose events are read one by one.

        Raises: ShuttingDown, Overloaded (before anything is validated), ValidationError. Never waits for a token.
        """
        check_shape(request, self.limits, streaming=True)
        return await self.start(request, caller)

    async def generate(self, request: GenerateRequest, caller: Caller = NOBODY) -> GenerationResult:
        """Run a request to its end; with ``best_of`` several generations at once, each with a permit of its own.

        Raises: RouterError. When one generation fails the others are cancelled.
        """
        check_shape(request, self.limits, streaming=False)
        copies = max(request.parameters.best_of or 1, 1)
        if copies == 1:
            choices = [await self._complete(request, caller)]
        else:
            tasks: list[asyncio.Task[Choice]] = []
            try:
                async with asyncio.TaskGroup() as group:
                    tasks += [group.create_task(self._complete(request, caller)) for _ in range(copies)]
            except* RouterError as errors:
                raise first_of(errors) from None
            choices = [task.result() for task in tasks]
        best = max(choices, key=Choice.mean_logprob)
        return GenerationResult(
            inputs=request.inputs,
            best=best,
            others=[choice for choice in choices if choice is not best],
            timings=best.finished.timings,
            prompt_tokens=best.finished.input_length,
            generated_tokens=best.finished.generated_tokens,
        )

    async def _complete(self, request: GenerateRequest, caller: Caller) -> Choice:
        tokens: list[Token] = []
        top_tokens: list[list[Token]] = []
        prefill: list[PrefillToken] = []
        async with await self.start(request, caller) as generation:
            while True:
                for event in await generation.next_events():
                    if isinstance(event, PrefillEvent):
                        prefill = event.tokens
                        continue
                    tokens.append(event.token)
                    if event.top_tokens is not None:
                        top_tokens.append(event.top_tokens)
                    if event.finished is not None:
                        return Choice(event.finished, tokens, prefill, top_tokens)

    async def start(self, request: GenerateRequest, caller: Caller, permit: Permit | None = None) -> Generation:
        """Start one generation, whatever the shape of the answer. ``permit``: one that was reserved; it is given back
        with the generation, or when this fails.

        Raises: ShuttingDown, Overloaded, ValidationError, DeadlineExceeded.
        """
        if permit is None:
            (permit,) = self.admission.reserve(1, caller)
        try:
            async with in_time(caller):
                valid, validation_s = await self._validate(request, caller)
            queued = QueuedRequest(valid, validation_s, is_part=permit.is_part)
            self._batcher.enqueue(queued)
            return Generation(queued, self._batcher, permit, self._deadline(queued, caller))
        except BaseException:
            permit.release()
            raise

    async def _validate(self, request: GenerateRequest, caller: Caller) -> tuple[ValidRequest, float]:
        """What is queued, and the seconds that it took to find out."""
        started = time.perf_counter()
        checked = check_parameters(request, self.limits)
        if request.input_ids is not None:
            input_ids = list(request.input_ids)
        else:
            if checked.truncate is None:
                check_length(self._tokenizer.least_tokens(checked.inputs), self.limits)
            with self._batcher.door.entering():
                encoding = await self._tokenizer.encode(checked.inputs, checked.add_special_tokens)
            input_ids = encoding.ids
        seed = checked.seed if checked.seed is not None else secrets.randbits(64)
        valid = build_request(checked, input_ids, self.limits, seed=seed, caller=caller)
        if valid.grammar is not None:
            await self._guidance.admit(valid.grammar)
        self._metrics.request_input_length.observe(len(valid.input_ids))
        self._metrics.request_max_new_tokens.observe(valid.max_new_tokens)
        return valid, time.perf_counter() - started

    def _deadline(self, queued: QueuedRequest, caller: Caller) -> asyncio.TimerHandle | None:
        """Ends the request when its time is over."""
        if caller.timeout_s is None:
            return None
        loop = asyncio.get_running_loop()
        return loop.call_later(left_s(caller), self._batcher.expire, queued, DeadlineExceeded(caller.timeout_s))
