"""Token ids to text, one id at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel, DecodeStream

_CONTEXT_IDS = 6
"""Last prompt ids that seed a sequence: a decoder that strips a leading space must see that the text goes on."""

_MOST_RECENT_IDS = 64
"""Kept in between; any number from the one above on will do."""

_REPLACEMENT = "\ufffd"
_LONGEST_INCOMPLETE = 3
"""Replacement characters that an incomplete character can look like: one for each of its bytes, or one for all."""
_MAX_HELD_IDS = 8
"""Ids that may wait for a character to become complete. A character has four bytes; after so many, what looks
incomplete is what the model wrote."""


class Detokenizer:
    """The shared part: one per model. Special ids are those whose text is not part of the answer."""

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.special_ids = special_ids
        # A token by itself, for lists of likely tokens: few distinct ids make up most of them.
        self.text_of = lru_cache(maxsize=16_384)(self._text_of)
        # Only there is the text of tokens that of their bytes, one behind the other, and nothing is done to it.
        is_byte_level = isinstance(tokenizer.decoder, ByteLevel)
        self._whole_text_of = lru_cache(maxsize=65_536)(self._whole_text) if is_byte_level else _no_text

    def _whole_text(self, token_id: int) -> str:
        text = self._text_of(token_id)
        return "" if _REPLACEMENT in text else text

    def _text_of(self, token_id: int) -> str:
        return str(self.tokenizer.decode([token_id], skip_special_tokens=False))

    def start(self, prompt_ids: Sequence[int]) -> SequenceDetokenizer:
        return SequenceDetokenizer(self.tokenizer, prompt_ids[-_CONTEXT_IDS:], self._whole_text_of)


def _no_text(token_id: int) -> str:
    return ""


class SequenceDetokenizer:
    """The text of one sequence, piece by piece.

    A piece is "" while a character is incomplete; a later one then carries all of it. The pieces and `rest`
    concatenate to the text of all ids. An answer that ends within a character leaves the rest out.
    """

    __slots__ = ("_held_ids", "_num_unshown", "_recent_ids", "_shown", "_stream", "_tokenizer", "_whole_text_of")

    def __init__(
        self, tokenizer: Tokenizer, context_ids: Sequence[int], whole_text_of: Callable[[int], str] = _no_text
    ) -> None:
        """``whole_text_of``: of a token whose text is the same whatever it follows, else ""."""
        self._tokenizer = tokenizer
        self._whole_text_of = whole_text_of
        # The last ids whose text is out, all but some last characters of it that look incomplete.
        self._recent_ids = list(context_ids)
        self._held_ids: list[int] = []
        self._stream: DecodeStream | None
        """None behind text that no later token can change."""
        self._num_unshown: int
        self._shown: str
        self._restart(num_unshown=0)

    def step(self, token_id: int) -> str:
        """The text that ``token_id`` completes."""
        piece: str | None
        if not (self._held_ids or self._num_unshown or self._shown) and (piece := self._whole_text_of(token_id)):
            # A lookup, in a tenth of the time: the stream decodes what it has twice for every token.
            self._recent_ids.append(token_id)
            self._forget()
            self._stream = None
            return piece
        self._held_ids.append(token_id)
        if self._stream is None:
            self._stream = DecodeStream(ids=[], skip_special_tokens=False)
        try:
            piece = self._stream.step(self._tokenizer, token_id)
        except Exception:
            # tokenizers raises a bare Exception when a decoder rewrites text it has already returned ("Invalid
            # prefix encountered"). Go on from this id: its own text is right, only joining rules across the
            # seam are lost.
            self._stream = DecodeStream(ids=[], skip_special_tokens=False)
            piece = self._stream.step(self._tokenizer, token_id)
        if piece:
            self._take_held()
            if self._shown:
                # What was shown as incomplete was either meant, or the bytes behind it have made something else of it.
                piece, self._shown = _behind(self._shown, piece), ""
            self._num_unshown = 0
            return piece
        return self._give_up() if len(self._held_ids) > _MAX_HELD_IDS else ""

    def rest(self) -> str:
        """What is held back at the end of the sequence: bytes that never became a character, or looked like it."""
        if not (self._held_ids or self._num_unshown):
            return ""
        text = self._decode([*self._recent_ids, *self._held_ids])
        return _behind(self._shown_text(), text)

    def _give_up(self) -> str:
        """Put out what is held, but for what the next id may still complete."""
        text = self.rest()
        self._take_held()
        # One character of the text may be several ids, and the recent ones have to say all that is not out.
        num_unshown = min(_num_incomplete(text), _num_incomplete(self._decode(self._recent_ids)), _LONGEST_INCOMPLETE)
        self._restart(num_unshown)
        return text[: len(text) - num_unshown]

    def _shown_text(self) -> str:
        """The text of the recent ids, as far as it is out."""
        text = self._decode(self._recent_ids)
        return text[: len(text) - self._num_unshown]

    def _take_held(self) -> None:
        self._recent_ids += self._held_ids
        self._held_ids.clear()
        self._forget()

    def _forget(self) -> None:
        if len(self._recent_ids) > _MOST_RECENT_IDS:  # not for every token
            del self._recent_ids[:-_CONTEXT_IDS]

    def _restart(self, num_unshown: int) -> None:
        """Go on behind the recent ids. A stream takes a context that ends in U+FFFD for unfinished: its first piece
        will hold all of it."""
        self._stream = DecodeStream(ids=list(self._recent_ids), skip_special_tokens=False)
        self._num_unshown = num_unshown
        self._shown = self._shown_text() if self._decode(self._recent_ids).endswith(_REPLACEMENT) else ""

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def _num_incomplete(text: str) -> int:
    """Characters at the end that the next id may make something else of."""
    return len(text) - len(text.rstrip(_REPLACEMENT))


def _behind(shown: str, text: str) -> str:
    """``text`` from where it differs from ``shown``, or goes on behind it."""
    same = 0
    for left, right in zip(shown, text, strict=False):
        if left != right:
            break
        same += 1
    return text[same:]
