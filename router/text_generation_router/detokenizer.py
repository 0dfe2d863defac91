"""Token ids to text, one id at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_CONTEXT_IDS = 6
"""Last prompt ids that seed a sequence: a decoder that strips a leading space must see that the text goes on."""

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """The shared part: one per model. Special ids are those whose text is not part of the answer."""

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.special_ids = special_ids
        # A token by itself, for lists of likely tokens: few distinct ids make up most of them.
        self.text_of = lru_cache(maxsize=16_384)(self._text_of)

    def _text_of(self, token_id: int) -> str:
        return str(self.tokenizer.decode([token_id], skip_special_tokens=False))

    def start(self, prompt_ids: Sequence[int]) -> SequenceDetokenizer:
        return SequenceDetokenizer(self.tokenizer, prompt_ids[-_CONTEXT_IDS:])


class SequenceDetokenizer:
    """The text of one sequence, piece by piece.

    A piece is "" while a character is incomplete; the next one then carries all of it. The pieces concatenate to
    the text of all ids, except for bytes at the very end that never became a character.
    """

    __slots__ = ("_owed", "_stream", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, context_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(context_ids), skip_special_tokens=False)
        # A context that ends in U+FFFD looks unfinished to the stream: it returns all of it with the first piece.
        text = str(tokenizer.decode(list(context_ids), skip_special_tokens=False))
        self._owed = text if text.endswith(_REPLACEMENT) else ""

    def step(self, token_id: int) -> str:
        """The text that ``token_id`` completes."""
        try:
            piece = self._stream.step(self._tokenizer, token_id)
        except Exception:
            # tokenizers raises a bare Exception when a decoder rewrites text it has already returned ("Invalid
            # prefix encountered"). Go on from this id: its own text is right, only joining rules across the
            # seam are lost.
            self._stream = DecodeStream(ids=[], skip_special_tokens=False)
            piece = self._stream.step(self._tokenizer, token_id)
        if piece and self._owed:
            # Either the character was meant, or the bytes behind it have made another one of it.
            shown = self._owed if piece.startswith(self._owed) else self._owed.rstrip(_REPLACEMENT)
            piece, self._owed = piece.removeprefix(shown), ""
        return piece or ""
