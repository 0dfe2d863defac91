"""Special tokens that people write into a chat stay text: nobody ends another's turn, or speaks with another's role.

A tokenizer makes a special token of its text wherever that stands. So what is special in the messages is hidden from
the chat template behind marks, and where the marks are in the prompt, a tokenizer reads that knows no special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""No characters, by Unicode's word, and free for such uses."""
_MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")

Piece = tuple[str, bool]
"""A part of a prompt, and whether all of it is text."""


class PlainText:
    """What is special, for all chats of a model."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        known = sorted({*special_tokens, _OPEN, _CLOSE} - {""}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, known)))

    def hide(self, value: Any, hidden: list[str]) -> Any:
        """A message, or whatever it consists of, with marks for what is special in its texts; that is added to
        ``hidden``. The names of members stay as they are."""
        if isinstance(value, str):

            def mark(match: re.Match[str]) -> str:
                hidden.append(match[0])
                return f"{_OPEN}{len(hidden) - 1}{_CLOSE}"

            return self._special.sub(mark, value)
        if isinstance(value, Mapping):
            return {name: self.hide(each, hidden) for name, each in value.items()}
        if isinstance(value, Sequence):
            return [self.hide(each, hidden) for each in value]
        return value


def pieces_of(prompt: str, hidden: Sequence[str]) -> list[Piece]:
    """The prompt without marks, cut where they were."""
    pieces: list[Piece] = []
    end = 0
    for match in _MARK.finditer(prompt):
        pieces.append((prompt[end : match.start()], False))
        pieces.append((hidden[int(match[1])], True))
        end = match.end()
    pieces.append((prompt[end:], False))
    return [piece for piece in pieces if piece[0]]
