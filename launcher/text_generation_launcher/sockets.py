"""Ports and socket paths: found taken before anything heavy starts, and private to one launch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from text_generation_launcher.errors import CannotListen

_LONGEST_PATH = 107
"""Bytes of a unix socket's path on Linux, without the closing zero."""
_PRIVATE_NAME = "shard"
_PREFIX = "text-generation-launch-"
_STALE_AFTER_S = 60.0
"""A younger folder may belong to a launch that has not locked it yet."""


def check_port(hostname: str, port: int) -> None:
    """Raises: CannotListen, when the HTTP port is taken or may not be used."""
    if reason := _why_not(hostname, port):
        raise CannotListen(reason)


def _why_not(hostname: str, port: int) -> str | None:
    family = socket.AF_INET6 if ":" in hostname else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As the router will: a connection in TIME_WAIT does not hold the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((hostname, port))
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return (
                f"Port {port} on {hostname} is already in use: choose another with --port, "
                "or stop the process that holds it"
            )
        return f"Cannot listen on {hostname} port {port}: {os.strerror(error.errno or 0)}"
    return None


def free_port() -> int:
    """A port that the system chooses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def socket_path(given: str | None, num_shard: int) -> Iterator[str]:
    """Absolute path of the shards' sockets without ``-{rank}``: ``given``, or in a private folder removed at the end.

    Raises: CannotListen, when the folder cannot be made, or a given path is too long or belongs to a living server.
    """
    if given:  # an empty one is none, as in the environment
        # As the shards would make it, so that they and the router mean the same.
        path = Path(given).absolute()
        if not _is_short(path, num_shard):
            raise CannotListen(
                f"The socket path {_longest(path, num_shard)} is longer than the {_LONGEST_PATH} bytes that the system "
                "allows: choose a shorter --shard-uds-path"
            )
        for rank in range(num_shard):
            _remove_stale(Path(f"{path}-{rank}"))
        yield str(path)
        return
    folder = _private_folder(num_shard)
    # Held as long as this process lives, however it ends: a launcher that was killed could not tidy up.
    lock = _lock(folder)
    try:
        _remove_left_behind(folder.parent)
        yield str(folder / _PRIVATE_NAME)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def launched_sockets() -> list[Path]:
    """Sockets of rank 0 in the private folders of this user's running launches."""
    folders = {Path(tempfile.gettempdir()).absolute(), Path("/tmp")}
    found = [path for folder in folders for path in folder.glob(f"{_PREFIX}*/{_PRIVATE_NAME}-0")]
    return sorted(path for path in found if path.stat().st_uid == os.getuid() and _is_listened_to(path))


def _is_listened_to(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None where another process has it, or the folder is not ours."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_left_behind(parent: Path) -> None:
    """Remove the folders of this user's launches that are no more."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < _STALE_AFTER_S:
                continue
            if (lock := _lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _longest(path: Path, num_shard: int) -> str:
    return f"{path}-{num_shard - 1}"


def _is_short(path: Path, num_shard: int) -> bool:
    return len(os.fsencode(_longest(path, num_shard))) <= _LONGEST_PATH


def _private_folder(num_shard: int) -> Path:
    """A fresh folder that only this user can enter (mkdtemp makes it 0700)."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX)).absolute()
        if not _is_short(folder / _PRIVATE_NAME, num_shard):
            folder.rmdir()
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise CannotListen(
            f"Cannot make a folder for the shards' sockets ({where}{error.strerror}): set TMPDIR or --shard-uds-path"
        ) from None
    return folder


def _remove_stale(path: Path) -> None:
    if not path.is_socket():
        if path.exists():
            raise CannotListen(f"{path} is not a socket: choose another --shard-uds-path")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise CannotListen(f"Cannot make the socket {path}: {path.parent} is missing or not writable")
        return
    if not _is_listened_to(path):
        path.unlink(missing_ok=True)
        return
    raise CannotListen(f"The socket {path} belongs to a running server: choose another --shard-uds-path")
