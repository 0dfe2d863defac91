"""The bytes that a token stands for, whether they are whole characters or not."""

from __future__ import annotations

import json
import re
from functools import lru_cache

from tokenizers import Tokenizer

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_SPELT_AS_THEMSELVES = [*range(33, 127), *range(161, 173), *range(174, 256)]


class TokenBytes:
    """Of one tokenizer. Byte-level and byte-fallback vocabularies have tokens that are parts of characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoder = "" if tokenizer.decoder is None else json.dumps(json.loads(tokenizer.decoder.__getstate__()))
        self._by_byte = _byte_alphabet() if '"ByteLevel"' in decoder else None
        self._has_fallback = '"ByteFallback"' in decoder
        self._has_metaspace = "\\u2581" in decoder
        self._added = frozenset(tokenizer.get_added_tokens_decoder())
        self.of = lru_cache(maxsize=65_536)(self._of)
        """The bytes of a token id; none of an id that the tokenizer does not know."""

    def special_id(self, text: str) -> int | None:
        """The id of a token that is one by itself, and not by its bytes; None if there is none of that spelling."""
        token_id = self._tokenizer.token_to_id(text)
        return token_id if token_id in self._added else None

    def _of(self, token_id: int) -> bytes:
        spelling = self._tokenizer.id_to_token(token_id)
        if spelling is None:
            return b""
        if token_id in self._added:
            return str(spelling).encode()
        if self._by_byte is not None and all(character in self._by_byte for character in spelling):
            return bytes(self._by_byte[character] for character in spelling)
        if self._has_fallback and (byte := _BYTE.fullmatch(spelling)):
            return bytes([int(byte[1], 16)])
        if self._has_metaspace:
            return str(spelling).replace("\u2581", " ").encode()
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False)).encode()


def _byte_alphabet() -> dict[str, int]:
    """Byte-level vocabularies spell each byte as a character that can be seen. Source: GPT-2."""
    alphabet = {chr(byte): byte for byte in _SPELT_AS_THEMSELVES}
    others = [byte for byte in range(256) if byte not in _SPELT_AS_THEMSELVES]
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}
