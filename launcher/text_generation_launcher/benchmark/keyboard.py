"""Single keys from the terminal, without Enter and without an echo."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import sys
import termios
import tty
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
    """Reads from the terminal of standard input, if it is one, from its making to ``close``."""

    def __init__(self, press: Callable[[Key], None]) -> None:
        self._press = press
        self._descriptor: int | None = None
        self._settings: list[Any] = []
        # A background job would be stopped for touching the terminal's settings; without a terminal there are no keys.
        with contextlib.suppress(OSError, ValueError, AttributeError, termios.error):
            stdin = sys.stdin.fileno()
            if not os.isatty(stdin) or os.tcgetpgrp(stdin) not in (0, os.getpgrp()):
                return
            # Opened anew: an event loop makes what it reads from non-blocking, and standard input is often the same
            # open file as standard error, which would then lose what the terminal does not take at once.
            self._descriptor = os.open(os.ttyname(stdin), os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
            self._settings = termios.tcgetattr(self._descriptor)
            tty.setcbreak(self._descriptor)  # Ctrl-C stays a signal
            asyncio.get_running_loop().add_reader(self._descriptor, self._read)

    def close(self) -> None:
        """Give the terminal back as it was."""
        if self._descriptor is None:
            return
        asyncio.get_running_loop().remove_reader(self._descriptor)
        if self._settings:
            with contextlib.suppress(termios.error):  # the terminal is gone
                termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._settings)
        os.close(self._descriptor)
        self._descriptor = None

    def _read(self) -> None:
        if self._descriptor is None:
            return
        try:
            data = os.read(self._descriptor, 64)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:  # the terminal is gone: a reader would be called for ever
            asyncio.get_running_loop().remove_reader(self._descriptor)
        for key in parse(data):
            self._press(key)
