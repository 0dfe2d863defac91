"""Several generations as one answer: one after another where they begin alike, all at once where they do not."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import msgspec

from text_generation_router.admission import Permit
from text_generation_router.generate_request import Caller, GenerateRequest
from text_generation_router.inference import Generation, Inference
from text_generation_router.scheduling.requests import Event, PrefillEvent


class Choices:
    """The generations of a request, by index. Leaving the context cancels what still runs."""

    def __init__(self, inference: Inference, caller: Caller) -> None:
        self._inference = inference
        self._caller = caller
        self._stack = AsyncExitStack()
        self._permits: list[Permit] = []
        self._generations: list[Generation | None] = []
        self._waiting: dict[asyncio.Task[list[Event]], int] = {}
        self._done: deque[asyncio.Task[list[Event]]] = deque()
        """Of these, those that are known to have ended."""
        self._later: dict[int, list[tuple[int, GenerateRequest]]] = {}

    async def start(self, requests: Sequence[GenerateRequest], num_copies: int) -> None:
        """Begin ``num_copies`` answers to each request; index: request times copies plus copy.

        The first copy of each goes ahead: when its first token is there, the others find its prompt in the cache.
        Raises: RouterError, whichever of them is refused.
        """
        self._generations = [None] * (len(requests) * num_copies)
        self._permits = self._inference.admission.reserve(len(self._generations), self._caller)
        for place, request in enumerate(requests):
            first, *others = ((place * num_copies + copy, _copy(request, copy)) for copy in range(num_copies))
            self._later[first[0]] = others
            await self._begin(*first)

    async def next(self) -> tuple[int, list[Event]] | None:
        """Events of one of them, with its index; None once all have ended. Raises: RouterError, when one fails."""
        if len(self._generations) == 1 and not self._waiting:
            return await self._next_of_one()
        if not self._waiting:
            return None
        if not self._done:
            ended, _ = await asyncio.wait(self._waiting, return_when=asyncio.FIRST_COMPLETED)
            self._done.extend(task for task in self._waiting if task in ended)
        task = self._done.popleft()
        index = self._waiting.pop(task)
        events = task.result()
        if later := self._later.pop(index, None):
            for each in later:
                await self._begin(*each)
        generation = self._generations[index]
        assert generation is not None
        last = events[-1]
        if isinstance(last, PrefillEvent) or last.finished is None:
            self._waiting[asyncio.ensure_future(generation.next_events())] = index
        else:
            generation.close()  # its permit is free while the others run on
        return index, events

    @property
    def first(self) -> Generation:
        """The first one, which has begun."""
        first = self._generations[0]
        assert first is not None
        return first

    async def _begin(self, index: int, request: GenerateRequest) -> None:
        generation = await self._inference.start(request, self._caller, self._permits[index])
        self._stack.callback(generation.close)
        self._generations[index] = generation
        if len(self._generations) > 1:
            self._waiting[asyncio.ensure_future(generation.next_events())] = index

    async def _next_of_one(self) -> tuple[int, list[Event]] | None:
        """Without a task for every token."""
        (generation,) = self._generations
        assert generation is not None
        events = await generation.next_events()
        return (0, events) if events else None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._waiting:
            task.cancel()
        if self._waiting:
            await asyncio.wait(self._waiting)
            for task in self._waiting:
                if not task.cancelled():
                    task.exception()
        await self._stack.aclose()
        for permit in self._permits:
            permit.release()


def _copy(request: GenerateRequest, index: int) -> GenerateRequest:
    if index == 0:
        return request
    return msgspec.structs.replace(request, more=msgspec.structs.replace(request.more, choice_index=index))
