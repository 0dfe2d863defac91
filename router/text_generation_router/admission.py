"""Who is let in: a request finds a place at once, or is turned away at once; and how long it may take."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from text_generation_router.errors import DeadlineExceeded, Overloaded, ShuttingDown
from text_generation_router.generate_request import NOBODY, Caller
from text_generation_router.scheduling.backlog import Backlog

RESERVED_SHARE = 2
"""One part in so many of the places is divided among the API keys, each its own; the rest is for who comes first."""


class Permit:
    """A place among ``max_concurrent_requests``, given back once."""

    __slots__ = ("_permits", "_tenant", "is_part")

    def __init__(self, permits: Permits | None, tenant: bytes = b"", *, is_part: bool = False) -> None:
        """``permits``: None where another permit stands for this one. ``is_part``: of a request that takes several."""
        self._permits = permits
        self._tenant = tenant
        self.is_part = is_part

    def release(self) -> None:
        if self._permits is not None:
            self._permits.give_back(self._tenant)
            self._permits = None


class Permits:
    """Counts the requests inside the server; none left is an immediate refusal, never a wait.

    Where several API keys share the server, none of them can take all places: a few are kept for each of the others.
    """

    def __init__(self, max_concurrent_requests: int, tenants: Collection[bytes] = ()) -> None:
        """``tenants``: who may come at any time, and is to find a place then."""
        self.limit = max_concurrent_requests
        self.num_taken = 0
        self._kept = self.limit // (RESERVED_SHARE * len(tenants)) if len(tenants) > 1 else 0
        self._taken: Counter[bytes] = Counter()
        self._tenants = tenants

    def is_full(self, tenant: bytes = b"") -> bool:
        """Whether none is left for it."""
        kept = 0
        if self._kept:
            kept = sum(max(self._kept - self._taken[other], 0) for other in self._tenants if other != tenant)
        return self.num_taken + kept >= self.limit

    def take(self, tenant: bytes = b"", *, is_part: bool = False) -> Permit:
        """Raises: Overloaded."""
        if self.is_full(tenant):
            raise Overloaded()
        self.num_taken += 1
        self._taken[tenant] += 1
        return Permit(self, tenant, is_part=is_part)

    def give_back(self, tenant: bytes) -> None:
        self.num_taken -= 1
        self._taken[tenant] -= 1
        if not self._taken[tenant]:
            del self._taken[tenant]


class Admission:
    """Of all requests that the model computes, whatever it computes for them."""

    def __init__(self, backlog: Backlog, max_concurrent_requests: int, tenants: Collection[bytes] = ()) -> None:
        """``tenants``: see `Permits`."""
        self.permits = Permits(max_concurrent_requests, tenants)
        self.draining = False
        self._backlog = backlog

    def drain(self) -> None:
        """Take nothing new. What runs may finish."""
        self.draining = True

    def is_full(self, tenant: bytes = b"") -> bool:
        """Whether a request of it would find no place now, however small it is."""
        return self._backlog.is_full or self.permits.is_full(tenant)

    def turn_away(self) -> Overloaded:
        """The refusal of one that finds none."""
        return Overloaded(self._backlog.turn_away())

    def reserve(self, count: int, caller: Caller = NOBODY) -> list[Permit]:
        """So many places, all or none. Raises: ShuttingDown, Overloaded."""
        if self.draining:
            raise ShuttingDown
        permits: list[Permit] = []
        try:
            if self._backlog.is_full:
                raise Overloaded
            while len(permits) < count:
                permits.append(self.permits.take(caller.tenant, is_part=count > 1))
        except Overloaded:
            for permit in permits:
                permit.release()
            raise self.turn_away() from None
        return permits


@asynccontextmanager
async def in_time(caller: Caller) -> AsyncIterator[None]:
    """End what is done inside when the caller's time is over, if it gave one. Raises: DeadlineExceeded."""
    try:
        async with asyncio.timeout(None if caller.timeout_s is None else left_s(caller)) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        assert caller.timeout_s is not None, "else there is no limit"
        raise DeadlineExceeded(caller.timeout_s) from None


def left_s(caller: Caller) -> float:
    """Of the time that it gave its request."""
    assert caller.timeout_s is not None
    return max(caller.asked_at + caller.timeout_s - time.perf_counter(), 0.0)
