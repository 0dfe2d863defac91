"""When a sequence ends, and where its text ends. The router alone decides; a shard never does."""

from __future__ import annotations

from dataclasses import dataclass

from text_generation_router.scheduling.requests import FinishReason


@dataclass(slots=True)
class StopTextMatcher:
    """Finds the first of several stop texts in text that arrives in pieces, also across and inside pieces.

    Cost per piece: one search over the piece and the few characters before it that a stop text could begin in.
    """

    stops: tuple[str, ...]
    _tail: str = ""
    _tail_length: int = 0

    def __post_init__(self) -> None:
        self._tail_length = max((len(stop) for stop in self.stops), default=1) - 1

    def end_of_match(self, piece: str) -> int | None:
        """Characters of ``piece`` up to the end of the earliest stop text; None when none is complete in it."""
        text = self._tail + piece
        # An empty stop text asks for one token, all of it.
        ends = [start + len(stop) if stop else len(text) for stop in self.stops if (start := text.find(stop)) >= 0]
        if ends:
            return max(min(ends) - len(self._tail), 0)
        self._tail = text[-self._tail_length :] if self._tail_length else ""
        return None


@dataclass(slots=True)
class StoppingRules:
    """The rules of one sequence in TGI's order: length, end-of-sequence token, stop text."""

    max_new_tokens: int
    eos_token_ids: frozenset[int]
    """Empty when the request ignores them."""
    matcher: StopTextMatcher | None

    def check(
        self, num_output_tokens: int, token_id: int, piece: str, *, special: bool = False
    ) -> tuple[FinishReason | None, str]:
        """Whether the sequence ends with this token, and the part of its text that is still output.

        ``num_output_tokens`` counts this token. The text is cut right behind a stop text even where another rule
        ends the sequence first. A special token is no part of the text: it ends a sequence only where a stop is
        exactly its spelling.
        """
        reason: FinishReason | None = None
        if self.matcher is not None and special:
            if piece in self.matcher.stops:
                reason = FinishReason.STOP_SEQUENCE
        elif self.matcher is not None:
            end = self.matcher.end_of_match(piece)
            if end is not None:
                reason, piece = FinishReason.STOP_SEQUENCE, piece[:end]
        if token_id in self.eos_token_ids:
            reason = FinishReason.EOS_TOKEN
        if num_output_tokens >= self.max_new_tokens:
            reason = FinishReason.LENGTH
        return reason, piece
