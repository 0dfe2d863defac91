"""A JSON value that arrives in pieces: where it ends, and the members of its top level as they come.

Linear in the text, whatever its pieces: what models write is not to be trusted with a parser that looks back.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

_OUTSIDE = re.compile(r'["{}\[\],:]')
_IN_STRING = re.compile(r'["\\]')
_SPACE = " \t\r\n"


@dataclass(slots=True)
class ObjectScanner:
    """Takes the text of one object, from its brace on. Members named in ``streamed`` are handed out as they come.

    Of the others only strings are kept, in ``strings``: a call is a name and its arguments.
    """

    streamed: frozenset[str]
    strings: dict[str, str] = field(default_factory=dict)
    ended: bool = False
    failed: bool = False
    """It is no JSON object."""
    _depth: int = 0
    _in_string: bool = False
    _escaped: bool = False
    _key: str | None = None
    _expects_key: bool = False
    _token: list[str] = field(default_factory=list)
    """The string at the top level that is being read, as written, without its quotes."""
    _reads_value: bool = False
    """Behind the colon of a member of the top level."""
    _value_is_string: bool = False
    _value_ended: bool = False
    """It was a string, an object or an array, which say themselves where they end: only a comma or a brace follows."""

    def feed(self, text: str) -> tuple[list[tuple[str, str]], str]:
        """Parts of streamed members, as (name, text), and what is left of ``text``: behind the object's end, or from
        the character on that no JSON object has there."""
        parts: list[tuple[str, str]] = []
        place = 0
        while place < len(text) and not (self.ended or self.failed):
            place = self._in_string_step(text, place, parts) if self._in_string else self._step(text, place, parts)
        return parts, text[place:]

    def _fail(self, place: int) -> int:
        self.failed = True
        return place

    def _step(self, text: str, place: int, parts: list[tuple[str, str]]) -> int:
        found = _OUTSIDE.search(text, place)
        stop = found.start() if found else len(text)
        between = text[place:stop]
        at_top = self._depth == 1
        if self._depth == 0 or (at_top and (not self._reads_value or self._value_ended)):
            blank = len(between) - len(between.lstrip(_SPACE))
            if blank < len(between):
                return self._fail(place + blank)
        self._hand_out(between.strip(_SPACE) if at_top else between, parts)
        if found is None:
            return stop
        sign = found[0]
        if self._depth == 0:
            if sign != "{":
                return self._fail(stop)
            self._depth, self._expects_key = 1, True
            return stop + 1
        if at_top and self._value_ended and sign not in ",}":
            return self._fail(stop)
        if sign == '"':
            self._in_string = True
            if at_top:
                self._token = []
                self._value_is_string = self._reads_value
            if self._reads_value and not (at_top and self._key in self.streamed):
                self._hand_out(sign, parts)
        elif at_top and sign == ":":
            if self._key is None or self._reads_value:
                return self._fail(stop)
            self._reads_value, self._value_is_string, self._value_ended = True, False, False
        elif at_top and sign == ",":
            if not self._end_member(parts):
                return self._fail(stop)
            self._expects_key = True
        elif sign in "{[":
            if at_top and not self._reads_value:
                return self._fail(stop)
            self._depth += 1
            self._hand_out(sign, parts)
        elif sign in "}]":
            self._depth -= 1
            if self._depth == 0:
                if sign != "}" or not self._end_member(parts):
                    return self._fail(stop)
                self.ended = True
            else:
                self._hand_out(sign, parts)
                self._value_ended = self._depth == 1
        else:
            self._hand_out(sign, parts)
        return stop + 1

    def _in_string_step(self, text: str, place: int, parts: list[tuple[str, str]]) -> int:
        at_top = self._depth == 1
        if self._escaped:
            self._escaped = False
            self._keep(text[place], at_top, parts)
            return place + 1
        found = _IN_STRING.search(text, place)
        stop = found.start() if found else len(text)
        self._keep(text[place:stop], at_top, parts)
        if found is None:
            return stop
        if found[0] == "\\":
            self._escaped = True
            self._keep("\\", at_top, parts)
            return stop + 1
        self._in_string = False
        if not at_top:
            self._hand_out('"', parts)
        elif not self._reads_value:
            key = _unquoted(self._token)
            if not self._expects_key or key is None:
                return self._fail(stop)
            self._key, self._expects_key = key, False
        else:
            self._value_ended = True
            if self._key not in self.streamed:
                self._hand_out('"', parts)
        return stop + 1

    def _keep(self, text: str, at_top: bool, parts: list[tuple[str, str]]) -> None:
        if at_top:
            self._token.append(text)
        if not (at_top and self._key in self.streamed):
            self._hand_out(text, parts)

    def _hand_out(self, text: str, parts: list[tuple[str, str]]) -> None:
        if text and self._reads_value and self._key in self.streamed:
            assert self._key is not None
            parts.append((self._key, text))

    def _end_member(self, parts: list[tuple[str, str]]) -> bool:
        """Whether the member that ends here was one."""
        if self._key is not None and not self._reads_value:
            return False
        if self._key is not None and self._value_is_string:
            text = _unquoted(self._token)
            if text is None:
                return False
            if self._key in self.streamed:  # JSON within a string: some models write it so
                parts.append((self._key, text))
            else:
                self.strings[self._key] = text
        self._key, self._reads_value, self._value_is_string, self._value_ended = None, False, False, False
        return True


def _unquoted(token: list[str]) -> str | None:
    try:
        return str(json.loads('"' + "".join(token) + '"', strict=False))
    except ValueError:
        return None
