"""More clients than there is room for, idle connections, readers that are slow: what others notice of them.

    python tests/faults/load.py --model DIR

The levels of load, scaled to a machine of a few cores: a quarter of the default number of concurrent requests, with
prompts of 64 tokens and answers of 32. Each takes turns with steady load on the same server, since a machine may be
faster in one minute than in the next. A client that is refused comes back when `Retry-After` says, or at once with
``--impatient``. Clients have a core of their own and the server has the others, as if they were elsewhere: what they
cost themselves is none of its business. With ``--share-cores`` both have all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import uvloop
from bench.load import prompts_of
from integration.asking import address_of, body, connect, message, token_ids, wait_until_idle
from integration.launched import Launched, starting
from text_generation_launcher.benchmark.sse import SseReader

LIMIT = 32
"""`--max-concurrent-requests`."""
TIMES = 4
"""More clients than that, where it is too much."""
INPUT_TOKENS, OUTPUT_TOKENS = 64, 32
IDLE, SLOW_HEADS = 1000, 200
REQUEST_EVERY_S = 8.0
"""Of an idle connection, which would be closed after `KEEP_ALIVE_S`, 10 s."""
SLOW_READERS, SILENT_READERS = 40, 10
BURST_EVERY_S = 10.0


@contextlib.contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """Have this thread, and what it starts, run on them alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


Beside = Callable[[Launched], AbstractAsyncContextManager[None]]


@dataclass(slots=True)
class Level:
    """What was seen at one of them."""

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    num_broken: int = 0
    num_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    """The same from when the client first asked, also where it was refused meanwhile."""
    gaps_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    router_mib: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a server."""

    clients: int = LIMIT
    bursts: bool = False
    beside: Beside | None = None


@dataclass(slots=True)
class Row:
    """A level, and that which took turns with it."""

    name: str
    steady: Level = field(default_factory=Level)
    loaded: Level = field(default_factory=Level)
    shares: list[float] = field(default_factory=list)
    """Of each round: the tokens of the level by those of the steady load."""


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


class Line:
    """A client's connection: opened when it is needed and kept between requests, as HTTP clients do."""

    def __init__(self, server: Launched) -> None:
        self._address = address_of(server)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, request: bytes) -> asyncio.StreamReader:
        """Where the answer comes."""
        if self._streams is None or self._streams[0].at_eof():
            self.close()
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        writer.write(request)
        return reader

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


class Clients:
    """Closed loops of streamed requests."""

    def __init__(
        self,
        server: Launched,
        prompts: list[str],
        level: Level,
        *,
        impatient: bool = False,
        reconnect: bool = False,
        key: str | None = None,
    ) -> None:
        """``impatient``: whether those that are refused come back at once. ``reconnect``: whether each request has a
        connection of its own."""
        self._server = server
        self._reconnect = reconnect
        headers = "" if key is None else f"authorization: Bearer {key}\r\n"
        self._requests = {
            prompt: message("/generate_stream", body(prompt, max_new_tokens=OUTPUT_TOKENS), headers=headers)
            for prompt in prompts
        }
        self._prompts = prompts
        self._level = level
        self._impatient = impatient

    async def run(self, count: int, seconds: float) -> None:
        until = time.monotonic() + seconds
        await asyncio.gather(*(self._loop(number, until) for number in range(count)))

    async def _loop(self, number: int, until: float) -> None:
        choice = random.Random(number)
        since, wait_s = time.monotonic(), 0.0
        with contextlib.closing(Line(self._server)) as line:
            while time.monotonic() < until:
                wait_s = await self._ask(line, choice.choice(self._prompts), until, since)
                if self._reconnect:
                    line.close()
                if wait_s:
                    pause_s = 0 if self._impatient else choice.uniform(0.5, 1.5) * wait_s
                    # Not beyond the end: a machine that has rested may be faster in the next turn.
                    await asyncio.sleep(min(pause_s, max(until - time.monotonic(), 0)))
                else:
                    since = time.monotonic()
        if wait_s:  # and would wait on
            self._level.waited_s.append(time.monotonic() - since)

    async def ask(self, prompt: str, until: float) -> None:
        """One request of a client that comes once."""
        with contextlib.closing(Line(self._server)) as line:
            await self._ask(line, prompt, until, time.monotonic())

    async def _ask(self, line: Line, prompt: str, until: float, since: float) -> float:
        """One request; seconds after which a refused client comes back, else 0. ``since``: when it first asked."""
        level = self._level
        response = SseReader()
        began = last = time.monotonic()
        received = b""
        reader = await line.send(self._requests[prompt])
        while not response.ended:
            data = await reader.read(65536)
            if not data:
                level.num_broken += 1
                return 0.0
            received = received or data
            for event in response.feed(data):
                now = time.monotonic()
                if b'"token"' not in event:
                    level.num_broken += 1
                    continue
                if last > began:
                    level.gaps_s.append(now - last)
                else:
                    level.first_token_s.append(now - began)
                    level.waited_s.append(now - since)
                last = now
                level.num_tokens += now < until  # what ends behind the time is no part of its throughput
        assert response.status is not None
        level.statuses[response.status] += 1
        if response.status != 429:
            return 0.0
        level.refused_s.append(time.monotonic() - began)
        head = received.lower().partition(b"retry-after: ")[2]
        return float(head.split(b"\r\n")[0] or 1)


async def probe(server: Launched, level: Level) -> None:
    """Ask for the server's health twenty times a second, on a connection of its own."""
    reader, writer = await asyncio.open_connection(*address_of(server))
    try:
        while True:
            began = time.monotonic()
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            level.health_s.append(time.monotonic() - began)
            level.num_broken += not head.startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.05)
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def meanwhile(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Have it done until the block is left."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(end, Exception):
                raise end


@contextlib.asynccontextmanager
async def idle_connections(server: Launched) -> AsyncIterator[None]:
    """Kept open, each with a request now and then, and others that have begun one and go on byte by byte."""
    address = address_of(server)
    live = b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n"
    idle = [await asyncio.open_connection(*address) for _ in range(IDLE)]
    slow = [await asyncio.open_connection(*address) for _ in range(SLOW_HEADS)]

    async def keep_alive() -> None:
        while True:
            for _, writer in idle:
                with contextlib.suppress(ConnectionError):
                    writer.write(live)
                await asyncio.sleep(REQUEST_EVERY_S / IDLE)

    async def drip() -> None:
        for _, writer in slow:
            writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\nx-slow: ")
        while True:
            for place, (_, writer) in enumerate(slow):
                if writer.transport.is_closing():  # cut off: the next one
                    slow[place] = await asyncio.open_connection(*address)
                    slow[place][1].write(b"GET /live HTTP/1.1\r\nhost: x\r\nx-slow: ")
                with contextlib.suppress(ConnectionError):
                    writer.write(b"a")
                await asyncio.sleep(1.0 / SLOW_HEADS)

    async with meanwhile(keep_alive(), drip()):
        yield
    for _, writer in (*idle, *slow):
        writer.transport.abort()


@contextlib.asynccontextmanager
async def readers(server: Launched, *, slow: bool) -> AsyncIterator[None]:
    """Clients that read a kilobyte a second, and some that never do, of answers that they ask for again and again; or
    as many that ask for the same, and read it at once."""

    async def read(rate: int) -> None:
        while True:
            with contextlib.suppress(OSError, AssertionError):
                async with connect(
                    server, "/generate_stream", body("slow", max_new_tokens=OUTPUT_TOKENS)
                ) as connection:
                    while rate:
                        await connection.some(rate)
                        await asyncio.sleep(1 if slow else 0)
                    await asyncio.sleep(20)

    rates = [1024] * SLOW_READERS + [0 if slow else 1024] * SILENT_READERS
    async with meanwhile(*(read(rate) for rate in rates)):
        yield


class Levels:
    def __init__(
        self,
        model: Path,
        seconds: float,
        rounds: int,
        *,
        impatient: bool = False,
        reconnect: bool = False,
        share_cores: bool = False,
    ) -> None:
        self._model = model
        self._seconds = seconds
        self._rounds = rounds
        self._impatient = impatient
        self._reconnect = reconnect
        cores = os.sched_getaffinity(0)
        self._client_cores = cores if share_cores or len(cores) == 1 else {max(cores)}
        self._server_cores = cores if share_cores or len(cores) == 1 else cores - self._client_cores
        source = prompts_of(model / "tokenizer.json", INPUT_TOKENS, seed=0)
        self._prompts = [next(source) for _ in range(200)]

    def run(self) -> list[Row]:
        with_readers = LIMIT + SLOW_READERS + SILENT_READERS  # who have places of their own
        quick = Load(beside=partial(readers, slow=False))
        return [
            self._row(f"{TIMES} times as many", Load(TIMES * LIMIT), compares=True),
            self._row(f"bursts of {TIMES} times as many", Load(TIMES * LIMIT, bursts=True)),
            self._row("beside idle and slow connections", Load(beside=idle_connections)),
            self._row(
                "beside slow readers", Load(beside=partial(readers, slow=True)), limit=with_readers, steady=quick
            ),
        ]  # fmt: skip

    def _row(self, name: str, load: Load, *, limit: int = LIMIT, steady: Load = Load(), compares: bool = False) -> Row:
        """``compares``: whether answers to requests alone are the same before and after."""
        row = Row(name)
        arguments = ("--model-id", str(self._model), "--max-concurrent-requests", str(limit))
        with contextlib.ExitStack() as stack:
            with on_cores(self._server_cores):
                server = stack.enter_context(starting(*arguments, environ={}))
            stack.enter_context(on_cores(self._client_cores))
            server.wait_until_ready()
            alone = self._alone(server) if compares else []
            uvloop.run(self._measure(server, Level(), steady))  # warm
            for number in range(self._rounds):
                rates: dict[bool, float] = {}
                for loaded in (True, False) if number % 2 else (False, True):  # in turn first
                    level = row.loaded if loaded else row.steady
                    rates[loaded] = uvloop.run(self._measure(server, level, load if loaded else steady))
                    wait_until_idle(server)
                    level.router_mib = server.processes()["router"].memory_info().rss / 2**20
                row.shares.append(rates[True] / rates[False])
            if compares and alone != self._alone(server):
                row.loaded.num_broken += 1
            assert server.stop() == 0
        return row

    def _alone(self, server: Launched) -> list[list[int]]:
        """Greedy answers one by one."""
        answers = []
        for prompt in self._prompts[:LIMIT]:
            response = server.client.post("/generate", json=body(prompt, max_new_tokens=OUTPUT_TOKENS))
            answers.append(token_ids(response.json()))
        return answers

    async def _measure(self, server: Launched, level: Level, load: Load) -> float:
        """Tokens per second."""
        clients = Clients(server, self._prompts, level, impatient=self._impatient, reconnect=self._reconnect)
        before = level.num_tokens
        async with contextlib.AsyncExitStack() as stack:
            if load.beside is not None:
                await stack.enter_async_context(load.beside(server))
                await asyncio.sleep(2)
            await stack.enter_async_context(meanwhile(probe(server, level)))
            began = time.monotonic()
            if load.bursts:
                while time.monotonic() - began < self._seconds:
                    next_at = time.monotonic() + BURST_EVERY_S
                    await asyncio.gather(*(clients.ask(prompt, next_at) for prompt in self._prompts[: load.clients]))
                    await asyncio.sleep(max(next_at - time.monotonic(), 0))
            else:
                await clients.run(load.clients, self._seconds)
            seconds = time.monotonic() - began if load.bursts else self._seconds
        level.seconds += seconds
        return (level.num_tokens - before) / seconds


def table(rows: list[Row]) -> str:
    lines = [
        "| level | tokens/s | of the steady load beside it | statuses | broken | TTFT p99 ms | ITL p99 ms | 429 p99 ms "
        "| /health p99 ms | router MiB |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        shares = " ".join(f"{share:.2f}" for share in row.shares)
        lines += [
            _line(f"{row.name}: steady", row.steady, ""),
            _line(row.name, row.loaded, f"**{statistics.median(row.shares):.2f}** ({shares}); all {_all(row):.2f}"),
        ]
    return "\n".join(lines)


def _all(row: Row) -> float:
    return row.loaded.tokens_per_s / row.steady.tokens_per_s


def _line(name: str, level: Level, share: str) -> str:
    statuses = ", ".join(f"{status}: {count}" for status, count in sorted(level.statuses.items()))
    times = [level.first_token_s, level.gaps_s, level.refused_s, level.health_s]
    shown = " | ".join(f"{percentile(each, 0.99) * 1e3:.0f}" if each else "-" for each in times)
    return (
        f"| {name} | {level.tokens_per_s:.0f} | {share} | {statuses} | {level.num_broken} | {shown} "
        f"| {level.router_mib:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a turn")
    parser.add_argument("--rounds", type=int, default=8, help="of steady load and a level each")
    parser.add_argument("--impatient", action="store_true", help="refused clients come back at once")
    parser.add_argument("--reconnect", action="store_true", help="each request has a connection of its own")
    parser.add_argument("--share-cores", action="store_true", help="of the server with its clients")
    arguments = parser.parse_args()
    rows = Levels(
        arguments.model,
        arguments.seconds,
        arguments.rounds,
        impatient=arguments.impatient,
        reconnect=arguments.reconnect,
        share_cores=arguments.share_cores,
    ).run()
    print(table(rows))
    sys.exit(any(row.steady.num_broken + row.loaded.num_broken for row in rows))


if __name__ == "__main__":
    main()
