"""A gRPC server on a unix socket that belongs to one process at a time.

gRPC itself takes over the socket of a live server without a word, and its clients then talk to another model: so a
lock file beside the socket says who owns the path.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
from text_generation_proto.v1 import generate_pb2_grpc as pb_grpc

from text_generation_server.config import ConfigError

_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
)


@dataclass(slots=True)
class Listener:
    url: str
    path: Path
    _server: grpc.aio.Server
    _lock: int

    async def close(self, grace_s: float = 0.0) -> None:
        """Stop accepting, cut calls that run longer than ``grace_s``, and leave no file behind."""
        await self._server.stop(grace_s)
        self.path.unlink(missing_ok=True)
        _lock_path(self.path).unlink(missing_ok=True)
        os.close(self._lock)


async def listen(servicer: pb_grpc.TextGenerationServicer, path: Path) -> Listener:
    """Serve on ``path``, which only this user may open. Raises: ConfigError if it is taken or cannot be made."""
    lock = own(path)
    try:
        server = grpc.aio.server(options=_OPTIONS)
        pb_grpc.add_TextGenerationServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
        url = f"unix://{path}"
        previous = os.umask(0o177)
        try:
            server.add_insecure_port(url)
        finally:
            os.umask(previous)
        await server.start()
    except (OSError, RuntimeError) as error:
        os.close(lock)
        raise ConfigError(f"cannot listen on {path}: {error}; choose another --uds-path") from error
    return Listener(url, path, server, lock)


def own(path: Path) -> int:
    """Lock ``path`` for this process, and clear it; returns the lock's file descriptor.

    Raises: ConfigError if another process holds it.
    """
    lock_path = _lock_path(path)
    while True:
        try:
            lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot make {lock_path}: {error.strerror}; choose another --uds-path") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise ConfigError(f"{path} belongs to another running server; choose another --uds-path") from None
        # The owner before may have removed the file between our open and our lock: then we hold nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(lock).st_ino == os.stat(lock_path).st_ino:
                path.unlink(missing_ok=True)  # left over by a process that was killed
                return lock
        os.close(lock)


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")
