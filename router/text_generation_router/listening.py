"""Sockets and uvicorn: bind early, listen late, and leave the signals to us."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn
from starlette.types import ASGIApp

from text_generation_router.http_protocol import HttpProtocol

logger = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_S = 10
"""Idle time of a connection between two requests. Also how long uvicorn remembers one that was reset."""
CLOSE_S = 3
"""Time that connections get to flush their last bytes at the end."""


class BindError(Exception):
    """The address cannot be listened on."""


def bind(hostname: str, port: int) -> socket.socket:
    """A bound socket that refuses connections until it listens. Port 0 is any free one. Raises: BindError."""
    host = _address(hostname)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches off Nagle's delay only where the protocol is named.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise BindError(f"Failed to bind to {_shown(host, port)}: {_reason(error)}") from None
    return sock


def shown_address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return _shown(host, port)


class HttpServer(uvicorn.Server):
    """uvicorn on a bound socket; it starts and stops when told, never by a signal of its own."""

    def __init__(self, app: ASGIApp, sock: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=HttpProtocol,
                loop="none",
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level=logging.WARNING,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CLOSE_S,
            )
        )
        self._sock = sock
        self._listening = asyncio.Event()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        """Take connections from now on. Raises: BindError."""
        try:
            # Somebody else may have begun to listen since we bound the address.
            self._sock.listen(BACKLOG)
        except OSError as error:
            raise BindError(f"Failed to bind to {shown_address(self._sock)}: {_reason(error)}") from None
        self._task = asyncio.create_task(self.serve(sockets=[self._sock]))
        waiting = asyncio.create_task(self._listening.wait())
        await asyncio.wait((self._task, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._task.done():
            self._task.result()  # why it does not listen

    async def close(self) -> None:
        """Stop listening, close idle connections, give the others CLOSE_S."""
        self.should_exit = True
        self._closing.set()
        if self._task is not None:
            await self._task
        self._sock.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening.set()

    async def main_loop(self) -> None:
        """Keep the date of the headers right. uvicorn's own wakes ten times a second, also when nothing happens."""
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), 1.0)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _address(hostname: str) -> str:
    if hostname == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(hostname.strip("[]")))
    except ValueError:
        # In a container HOSTNAME is the container's id: TGI listens on all addresses then.
        logger.warning("Invalid hostname, defaulting to 0.0.0.0")
        return "0.0.0.0"


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
