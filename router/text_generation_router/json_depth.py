"""How deep JSON nests, in a body or in a text within it."""

from __future__ import annotations

from itertools import accumulate

MAX_DEPTH = 64
"""Levels of arrays and objects. No body of ours needs a dozen."""

_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def is_too_deep(document: bytes) -> bool:
    """Whether the brackets of a valid document nest deeper than MAX_DEPTH, without a Python loop over its bytes."""
    if document.count(b"[") + document.count(b"{") <= MAX_DEPTH:
        return False
    # Without escapes, every other piece between quotes lies outside of strings.
    outside = document.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]
    brackets = b"".join(outside).translate(None, _NOT_BRACKETS)
    return max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > MAX_DEPTH
