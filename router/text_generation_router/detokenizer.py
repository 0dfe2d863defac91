"""Token ids to text, one id at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_CONTEXT_IDS = 6
"""Last prompt ids that seed a sequence: a decoder that strips a leading space must see that the text goes on."""


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

    __slots__ = ("_stream", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, context_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(context_ids), skip_special_tokens=False)

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
        return piece or ""
