"""Sockets and uvicorn: bind early, listen late, and leave the signals to us."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import resource
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from text_generation_router.http_protocol import FIRST_BYTE_S, HttpProtocol, Turnstile

logger = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_S = 10
"""Idle time of a connection between two requests."""
SEND_BUFFER_BYTES = 128 * 1024
"""Of a connection, in the kernel; by itself it takes megabytes, and a client that does not read is seen late."""
PROBE_AFTER_S, PROBE_EVERY_S, PROBES = 30, 10, 3
"""A connection on which nothing comes is probed then, and so often."""
UNACKNOWLEDGED_MS = 60_000
"""After so long without a sign that it arrives, what was sent is given up, and the connection with it."""
MOST_DESCRIPTORS = 65_536
METRICS_CONNECTIONS = 64
"""On a port of their own."""
OWN_DESCRIPTORS = 64 + METRICS_CONNECTIONS
"""Of the process, for what is no connection of a client."""
TLS_SHUTDOWN_S = 1.0
CLOSE_S = 3
"""Time that connections get to flush their last bytes at the end, at least."""


class BindError(Exception):
    """The address cannot be listened on."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM."""

    cert: str
    """The server's certificate, and those of the authorities between it and the root."""
    key: str

    def check(self) -> None:
        """Raises: BindError, when they cannot be used."""
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                self.cert,
                self.key,
                password="",  # of a key that needs one: nobody is there to be asked
            )
        except (OSError, ssl.SSLError) as error:
            raise BindError(f"`--tls-cert {self.cert}` and `--tls-key` cannot be used: {_reason(error)}") from None


def bind(hostname: str, port: int) -> socket.socket:
    """A bound socket that refuses connections until it listens. Port 0 is any free one. Raises: BindError."""
    host = _address(hostname)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches off Nagle's delay only where the protocol is named.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _limit_connections(sock)
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise BindError(f"Failed to bind to {_shown(host, port)}: {_reason(error)}") from None
    return sock


def _limit_connections(sock: socket.socket) -> None:
    """What every connection of it inherits: how much it may hold, and when a silent peer counts as gone."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": PROBE_AFTER_S,
        "TCP_KEEPINTVL": PROBE_EVERY_S,
        "TCP_KEEPCNT": PROBES,
        "TCP_USER_TIMEOUT": UNACKNOWLEDGED_MS,
    }
    for name, value in options.items():
        number = getattr(socket, name, None)  # they are the system's own
        if number is not None:
            sock.setsockopt(socket.IPPROTO_TCP, number, value)


def connections_that_fit() -> int | None:
    """How many the process has descriptors for, once it has taken as many as it may have; None: as many as come."""
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        return None
    return max(wanted - OWN_DESCRIPTORS, wanted // 2)


def shown_address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return _shown(host, port)


def protocol_with(max_connections: int | None, turnstile: Turnstile | None) -> type[HttpProtocol]:
    return type("OwnHttpProtocol", (HttpProtocol,), {"max_connections": max_connections, "turnstile": turnstile})


class HttpServer(uvicorn.Server):
    """uvicorn on a bound socket; it starts and stops when told, never by a signal of its own."""

    def __init__(
        self,
        app: ASGIApp,
        sock: socket.socket,
        tls: Tls | None = None,
        *,
        turnstile: Turnstile | None = None,
        max_connections: int | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol_with(max_connections, turnstile),
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
                ssl_certfile=None if tls is None else tls.cert,
                ssl_keyfile=None if tls is None else tls.key,
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

    async def close(self, timeout_s: float = 0.0) -> None:
        """Stop listening, close idle connections, give the others ``timeout_s``, at least CLOSE_S."""
        self.config.timeout_graceful_shutdown = max(math.ceil(timeout_s), CLOSE_S)
        self.should_exit = True
        self._closing.set()
        if self._task is not None:
            await self._task
        self._sock.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, with limits of time for TLS: it leaves a connection a minute to say hello, and half a one to say
        goodbye."""
        config, loop = self.config, asyncio.get_running_loop()
        limits: dict[str, Any] = {}
        if config.ssl is not None:
            limits = {"ssl_handshake_timeout": FIRST_BYTE_S, "ssl_shutdown_timeout": TLS_SHUTDOWN_S}
        await self.lifespan.startup()
        self.servers = [
            await loop.create_server(self._protocol, sock=sock, ssl=config.ssl, backlog=config.backlog, **limits)
            for sock in sockets or ()
        ]
        self.started = True
        self._listening.set()

    def _protocol(self) -> asyncio.Protocol:
        protocol_class: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = protocol_class(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol

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
