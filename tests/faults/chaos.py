"""A TCP proxy that delays, resets and garbles connections."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field


@dataclass(slots=True)
class Chaos:
    """Shares of connections to which something happens."""

    seed: int = 0
    latency_s: float = 0.0
    resets: float = 0.0
    garbage: float = 0.0
    """In what the client sends: what the server gets is no HTTP any more."""
    num_disturbed: int = 0
    _choice: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._choice = random.Random(self.seed)

    async def connect(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: tuple[str, int]
    ) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(*address)
        resets, garbles = self._choice.random() < self.resets, self._choice.random() < self.garbage
        self.num_disturbed += resets or garbles
        after_s = self._choice.uniform(0.0, 1.0)

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, garbled: bool) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65536):
                    await asyncio.sleep(self.latency_s)
                    sink.write(self._choice.randbytes(len(data)) if garbled else data)
                    await sink.drain()
                sink.write_eof()

        copies = asyncio.gather(
            copy(reader, upstream_writer, garbled=garbles), copy(upstream_reader, writer, garbled=False)
        )
        try:
            if resets:
                await asyncio.wait((copies,), timeout=after_s)
            else:
                await copies
        finally:
            copies.cancel()
            writer.transport.abort()
            upstream_writer.transport.abort()


@contextlib.asynccontextmanager
async def chaos_proxy(chaos: Chaos, address: tuple[str, int]) -> AsyncIterator[str]:
    """The URL of a proxy in front of ``address``."""
    server = await asyncio.start_server(lambda reader, writer: chaos.connect(reader, writer, address), "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}"
