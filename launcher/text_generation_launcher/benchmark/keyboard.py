"""Single keys from the terminal, without Enter and without an echo."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import sys
from collections.abc import Callable
from typing import Any


class Key(enum.Enum):
    LEFT = "left"
    RIGHT = "right"
    QUIT = "quit"


_KEYS = {
    b"\x1b[D": Key.LEFT,
    b"\x1bOD": Key.LEFT,
    b"h": Key.LEFT,
    b"\x1b[C": Key.RIGHT,
    b"\x1bOC": Key.RIGHT,
    b"l": Key.RIGHT,
    b"q": Key.QUIT,
}


def parse(data: bytes) -> list[Key]:
    """The keys that a read from the terminal holds; others are left out."""
    keys: list[Key] = []
    while data:
        found = next((code for code in _KEYS if data.startswith(code)), None)
        if found is not None:
            keys.append(_KEYS[found])
        data = data[len(found or b"x") :]
    return keys


class Keyboard:
    """Reads standard input from its making to ``close``, if that is the terminal of this process."""

    def __init__(self, press: Callable[[Key], None]) -> None:
        self._press = press
        self._descriptor = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._settings: list[Any] | None = None
        if self._descriptor is None:
            return
        import termios
        import tty

        with contextlib.suppress(termios.error):
            self._settings = termios.tcgetattr(self._descriptor)
            tty.setcbreak(self._descriptor)  # Ctrl-C stays a signal
            asyncio.get_running_loop().add_reader(self._descriptor, self._read)

    def close(self) -> None:
        """Give the terminal back as it was."""
        if self._settings is None or self._descriptor is None:
            return
        import termios

        asyncio.get_running_loop().remove_reader(self._descriptor)
        termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._settings)
        self._settings = None

    def _read(self) -> None:
        assert self._descriptor is not None
        for key in parse(os.read(self._descriptor, 64)):
            self._press(key)
