"""The client's side of a fault: one entry for every request, with how it ended and what it got."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from integration.asking import WITHIN_S, Connection, connect
from integration.launched import Launched

LOGPROB_TOLERANCE = 1e-4


class End(enum.StrEnum):
    OK = "ok"
    HTTP_ERROR = "http_error"
    SSE_ERROR = "sse_error"
    CONN_ERROR = "conn_error"
    """The connection broke off: never a server's doing, unless the connection itself was the fault."""


@dataclass(slots=True)
class Entry:
    """One request. ``end`` stays None only of one that hangs."""

    request: dict[str, Any]
    is_stream: bool
    sent_at: float = 0.0
    first_at: float | None = None
    ended_at: float | None = None
    end: End | None = None
    status: int | None = None
    error: dict[str, Any] | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    """Set with the first token of a stream, or the end of whatever it is."""


class Ledger:
    """Sends requests to a server, or to the URL of one, and keeps the books."""

    def __init__(self, server: Launched | str) -> None:
        self._url = server if isinstance(server, str) else server.url
        self.entries: list[Entry] = []
        self._tasks: list[asyncio.Task[None]] = []

    def send(self, request: dict[str, Any], *, stream: bool = True) -> Entry:
        entry = Entry(request, stream)
        self.entries.append(entry)
        self._tasks.append(asyncio.create_task(self._follow(entry)))
        return entry

    def send_all(self, requests: Sequence[tuple[dict[str, Any], bool]]) -> None:
        """Each with whether it is a stream."""
        for request, stream in requests:
            self.send(request, stream=stream)

    async def begun(self) -> None:
        """Wait until every stream has its first token."""
        async with asyncio.timeout(WITHIN_S):
            for entry in self.entries:
                if entry.is_stream:
                    await entry.begun.wait()

    async def ended(self) -> None:
        """Wait until every request has an end. One that has none after a long time hangs: its entry stays open."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=WITHIN_S)

    @property
    def ends(self) -> dict[str, int]:
        """How many ended how; ``hung`` are those that did not."""
        return dict(Counter("hung" if entry.end is None else entry.end.value for entry in self.entries))

    @property
    def longest_gap_s(self) -> float:
        return max((entry.ended_at or time.monotonic()) - entry.sent_at for entry in self.entries)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, entry: Entry) -> None:
        path = "/generate_stream" if entry.is_stream else "/generate"
        entry.sent_at = time.monotonic()
        try:
            async with connect(self._url, path, entry.request) as connection:
                if entry.is_stream:
                    await self._read_stream(entry, connection)
                else:
                    answer = await connection.answer()
                    self._take_answer(entry, connection.status, answer)
        except (OSError, AssertionError, ValueError, asyncio.IncompleteReadError):
            entry.end = End.CONN_ERROR
        entry.ended_at = time.monotonic()
        entry.begun.set()

    async def _read_stream(self, entry: Entry, connection: Connection) -> None:
        last: dict[str, Any] = {}
        async for event in connection.events():
            entry.first_at = entry.first_at or time.monotonic()
            last = event
            if "token" in event:
                entry.token_ids.append(event["token"]["id"])
                entry.logprobs.append(event["token"]["logprob"])
                entry.begun.set()
        entry.status = connection.status
        if entry.status != 200:
            entry.end, entry.error = End.HTTP_ERROR, connection.body()
        elif "error" in last:
            entry.end, entry.error = End.SSE_ERROR, last
        else:
            entry.end = End.OK if last.get("generated_text") is not None else End.CONN_ERROR

    def _take_answer(self, entry: Entry, status: int | None, answer: Any) -> None:
        entry.status = status
        if status != 200:
            entry.end, entry.error = End.HTTP_ERROR, answer
            return
        entry.token_ids = [token["id"] for token in answer["details"]["tokens"]]
        entry.logprobs = [token["logprob"] for token in answer["details"]["tokens"]]
        entry.end = End.OK


@contextlib.asynccontextmanager
async def ledger(server: Launched | str) -> AsyncIterator[Ledger]:
    books = Ledger(server)
    try:
        yield books
    finally:
        await books.close()


async def undisturbed(server: Launched, requests: Sequence[tuple[dict[str, Any], bool]]) -> list[Entry]:
    """What the requests get when nothing goes wrong."""
    async with ledger(server) as books:
        books.send_all(requests)
        await books.ended()
        assert books.ends == {"ok": len(requests)}, [entry.error for entry in books.entries]
        return books.entries


def assert_equal(disturbed: Sequence[Entry], expected: Sequence[Entry]) -> None:
    """The same tokens, and logprobs that differ by less than float32 does."""
    for got, wanted in zip(disturbed, expected, strict=True):
        assert got.end is End.OK, (got.end, got.error)
        assert got.token_ids == wanted.token_ids, got.request
        differences = [
            abs(one - other)
            for one, other in zip(got.logprobs, wanted.logprobs, strict=True)
            if one is not None and other is not None
        ]
        assert max(differences, default=0.0) <= LOGPROB_TOLERANCE
