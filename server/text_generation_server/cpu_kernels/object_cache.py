"""Machine code of kernels on disk, from one start to the next: LLVM takes seconds for what a file holds.

In the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``); one that cannot be used makes starts slower, nothing
else. What is read is run: only from a folder, and files, that nobody but this user can write.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

MAX_FILES = 1000
"""Of 10 to 100 KiB. Models of other shapes, processors and versions leave theirs; the least recently used go first."""


def folder() -> Path:
    """Where the files are, or will be."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path("~/.cache").expanduser()) / "text-generation/kernels"


def key_of(*parts: str) -> str:
    """A file name for what was made from all of ``parts``."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load(key: str) -> bytes | None:
    """What was stored under the key; None if nothing was, if it is not whole, or if others could have put it there."""
    path = folder() / key
    try:
        if not (_is_own(path.parent) and _is_own(path)):
            return None
        stored = path.read_bytes()
        os.utime(path)
    except (OSError, RuntimeError):  # the latter where there is no home
        return None
    checksum, code = stored[:32], stored[32:]
    return code if hashlib.sha256(code).digest() == checksum else None


def store(key: str, code: bytes) -> None:
    """Keep it for later starts, as far as possible."""
    try:
        place = folder()
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _is_own(place):
            return
        with tempfile.NamedTemporaryFile(dir=place, delete=False) as file:  # shards start at once
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, place / key)
        _prune(place)
    except (OSError, RuntimeError) as error:
        logger.debug("compiled kernels are not kept: %s", error)


def _is_own(path: Path) -> bool:
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _prune(place: Path) -> None:
    with os.scandir(place) as entries:
        files = [(entry.stat().st_mtime, entry.path) for entry in entries]
    for _, path in sorted(files)[: max(len(files) - MAX_FILES, 0)]:
        Path(path).unlink(missing_ok=True)
