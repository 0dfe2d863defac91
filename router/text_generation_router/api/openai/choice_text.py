"""The text of one answer as OpenAI's clients get it: without the stop text, with logprobs of the tokens it consists of.

Pure. What the engine hands out ends with the stop text, in TGI's manner, so text that may turn out to be the beginning
of one is held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from text_generation_router.chat.output import longest_beginning
from text_generation_router.scheduling.requests import FinishReason, TokenEvent


@dataclass(slots=True)
class Piece:
    """Text that goes to the client, and the tokens that end in it."""

    text: str
    tokens: list[TokenEvent]


@dataclass(slots=True)
class ChoiceText:
    """Takes events one by one; the pieces it returns concatenate to the answer."""

    stops: Sequence[str] = ()
    marks: Sequence[str] = ()
    """Special tokens that are part of one of them are text all the same: the text is still to be taken apart."""
    stop_text: str | None = None
    """The one that ended it."""
    finish_reason: str | None = None
    """OpenAI's word for how it ended; None before the end."""
    _held: str = ""
    _tokens: list[tuple[int, TokenEvent]] = field(default_factory=list)
    """Not handed out: where each one's text ends, counted from the beginning of ``_held``."""

    def add(self, event: TokenEvent) -> Piece:
        """The text that is certain with this token. Special tokens have none."""
        token = event.token
        if not token.special or self._is_mark(event):
            self._held += token.text
            self._tokens.append((len(self._held), event))
        if event.finished is None:
            return self._release(len(self._held) - longest_beginning(self._held, self.stops))
        reason = event.finished.finish_reason
        # The engine cuts the text behind a stop text whatever else ends it there.
        self.stop_text = max((stop for stop in self.stops if self._held.endswith(stop)), key=len, default=None)
        stop = len(self.stop_text or "")
        self.finish_reason = "length" if reason is FinishReason.LENGTH and not stop else "stop"
        kept = len(self._held) - stop
        piece = self._release(kept)
        if stop == 0:
            piece.tokens += [event for _, event in self._tokens]
        self._held, self._tokens = "", []
        return piece

    def _is_mark(self, event: TokenEvent) -> bool:
        finished = event.finished
        if finished is not None and finished.finish_reason is FinishReason.EOS_TOKEN:
            return False
        return any(event.token.text in mark for mark in self.marks)

    def _release(self, size: int) -> Piece:
        text, self._held = self._held[:size], self._held[size:]
        # A token without text of its own belongs to the character that a later one completes.
        count = 0
        for place, (end, event) in enumerate(self._tokens, start=1):
            if end <= size and event.token.text:
                count = place
        tokens = [event for _, event in self._tokens[:count]]
        self._tokens = [(end - size, event) for end, event in self._tokens[count:]]
        return Piece(text, tokens)
