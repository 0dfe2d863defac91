"""How many tokens a text has at least, without tokenising it: a text of megabytes takes seconds and a processor."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

_KEEPS_ALL = frozenset({"ByteLevel", "Metaspace", "Digits"})
"""Pre-tokenizers that cut a text and leave nothing out."""


def longest_token_bytes(tokenizer: Tokenizer) -> int | None:
    """Bytes of text that no token exceeds; None where a token, or nothing, may stand for any length of text.

    That is so where a normaliser makes texts shorter, a pre-tokenizer leaves parts out, a special token swallows the
    space around it, or what is unknown is one token whatever its length.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    cutting = tokenizer.pre_tokenizer
    if (
        not isinstance(tokenizer.model, models.BPE)
        or tokenizer.model.unk_token is not None
        or tokenizer.normalizer is not None
        or not _leaves_nothing_out(None if cutting is None else json.loads(cutting.__getstate__()))
        or any(token.lstrip or token.rstrip for token in added)
    ):
        return None
    vocabulary = tokenizer.get_vocab()
    is_whole = tokenizer.model.byte_fallback or (
        cutting is not None
        and "ByteLevel" in str(cutting)
        and vocabulary.keys() >= set(pre_tokenizers.ByteLevel.alphabet())
    )
    if not is_whole:  # what it does not know is left out
        return None
    # In a byte-level vocabulary each character is a byte; anywhere else the text of a token is as long as it looks.
    return max(len(text.encode()) for text in vocabulary)


def _leaves_nothing_out(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return True
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return all(map(_leaves_nothing_out, pre_tokenizer.get("pretokenizers") or []))
    if kind == "Split":
        return pre_tokenizer.get("behavior") != "Removed"
    return kind in _KEEPS_ALL
