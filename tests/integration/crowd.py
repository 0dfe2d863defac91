"""A server whose permits are all taken."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from integration.asking import address_of, body, message, num_in_progress, wait_until, wait_until_idle
from integration.launched import Launched
from integration.reciting import ENDLESS

PERMITS = 128
"""`--max-concurrent-requests` by default."""


@contextlib.contextmanager
def full(server: Launched) -> Iterator[None]:
    """While inside, 128 clients wait for a shard that does nothing."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(server.shards_frozen())
        for _ in range(PERMITS):
            connection = stack.enter_context(socket.create_connection(address_of(server)))
            connection.sendall(message("/generate_stream", body(ENDLESS)))
        wait_until(server, lambda now: num_in_progress(now) == PERMITS)
        yield
    wait_until_idle(server)
