"""What a model writes -> what a client reads: reasoning, content, and calls of tools. One machine for streams and whole
answers; how the text is cut into pieces changes nothing.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from text_generation_router.chat.json_scanner import ObjectScanner

_SPACE = " \t\r\n"
_BETWEEN_CALLS = _SPACE + ",;"
ARGUMENTS = frozenset(("arguments", "parameters"))


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A part of the JSON text of a call's arguments."""

    index: int
    text: str


Delta = Content | Reasoning | CallBegins | CallArguments


class Stage(Protocol):
    """Takes pieces of text, hands out deltas."""

    def feed(self, text: str) -> Iterator[Delta]: ...

    def end(self) -> Iterator[Delta]:
        """What was held back; nothing comes after it."""


class Plain:
    """All is content."""

    def feed(self, text: str) -> Iterator[Delta]:
        if text:
            yield Content(text)

    def end(self) -> Iterator[Delta]:
        return iter(())


@dataclass(slots=True)
class ReasoningStage:
    """Takes out what stands between two marks, which comes first if it comes at all; the rest goes to ``rest``."""

    begin_mark: str
    end_mark: str
    rest: Stage
    inside: bool = False
    """Whether the prompt has opened it."""
    _held: str = ""
    _over: bool = False
    _reasoning_begun: bool = False
    _answer_begun: bool = False

    def feed(self, text: str) -> Iterator[Delta]:
        if self._over:
            if not self._answer_begun:  # white space behind the mark belongs to it
                text = text.lstrip(_SPACE)
                self._answer_begun = bool(text)
            yield from self.rest.feed(text)
            return
        self._held += text
        if not self.inside:
            start = self._held.lstrip(_SPACE)
            if start.startswith(self.begin_mark):
                self.inside, self._held = True, start[len(self.begin_mark) :]
            elif self.begin_mark.startswith(start):
                return  # not known yet
            else:
                yield from self._give_up()
                return
        if not self._reasoning_begun:
            self._held = self._held.lstrip(_SPACE)
            self._reasoning_begun = bool(self._held)
        end = self._held.find(self.end_mark)
        if end >= 0:
            reasoning, answer = self._held[:end], self._held[end + len(self.end_mark) :]
            if reasoning.rstrip(_SPACE):
                yield Reasoning(reasoning.rstrip(_SPACE))
            self._over, self._held = True, ""
            yield from self.feed(answer)
            return
        # White space at the end may stand before the mark, and then it is no part of the reasoning.
        safe = len(self._held) - longest_beginning(self._held, (self.end_mark,))
        safe = len(self._held[:safe].rstrip(_SPACE))
        if safe:
            yield Reasoning(self._held[:safe])
            self._held = self._held[safe:]

    def end(self) -> Iterator[Delta]:
        if not self._over:
            if self.inside:
                if self._held:
                    yield Reasoning(self._held)
            else:
                yield from self.rest.feed(self._held)
        self._held = ""
        yield from self.rest.end()

    def _give_up(self) -> Iterator[Delta]:
        held, self._held, self._over, self._answer_begun = self._held, "", True, True
        yield from self.rest.feed(held)


# ---------------------------------------------------------------------------------------------------


class CallReader(Protocol):
    """Reads the text of one section of calls."""

    refused: bool
    """The text is no call: it is content after all."""

    def feed(self, text: str) -> tuple[list[Delta], str | None]:
        """Deltas, and what is left behind the end of the section; None where it goes on."""

    def end(self) -> None:
        """The text ends here."""


@dataclass(slots=True)
class Calls:
    """Numbers and names the calls of an answer."""

    new_id: Callable[[int], str]
    names: frozenset[str]
    """Of the tools there are: whatever calls another is no call."""
    count: int = 0

    def begin(self, name: str) -> CallBegins:
        index, self.count = self.count, self.count + 1
        return CallBegins(index, self.new_id(index), name)


MAX_UNKNOWN = 64 * 2**10
"""Characters of a section that may still be none: what is read again then has to be bounded."""


@dataclass(slots=True)
class CallStage:
    """Content, and sections of calls in it that begin with a mark, or, without any, at the beginning of the answer."""

    marks: tuple[str, ...]
    new_reader: Callable[[Calls], CallReader]
    calls: Calls
    at_beginning: str = ""
    """Characters of which one begins a call at the very beginning."""
    _held: str = ""
    _raw: list[str] = field(default_factory=list)
    """Of the section that is being read, while no call of it was handed out: it may be content after all."""
    _reader: CallReader | None = None
    _begun: bool = False
    _num_before: int = 0
    _size: int = 0
    """Characters of the section so far."""

    def feed(self, text: str) -> Iterator[Delta]:
        while text or self._held:
            if self._reader is None:
                text = self._held + text
                self._held = ""
                found = self._find(text)
                if found is None:
                    if self._held == text:
                        return
                    text = text[: len(text) - len(self._held)]
                    yield from self._content(text)
                    return
                start, length = found
                kept = len(text[:start].rstrip(_SPACE))
                yield from self._content(text[:kept])
                self._begun = True
                self._reader, self._num_before = self.new_reader(self.calls), self.calls.count
                self._raw, text = [text[kept : start + length]], text[start + length :]
                self._size = 0
                if not text:
                    return
            # Where it is given up, it is so at the same character, whatever the pieces.
            room = len(text) if self._is_known else MAX_UNKNOWN - self._size
            yield from self._read(text[:room])
            text = text[room:]

    def end(self) -> Iterator[Delta]:
        if self._reader is not None:
            self._reader.end()
            if self._reader.refused:
                yield Content("".join(self._raw))
            self._reader = None
        if self._held:
            held, self._held = self._held, ""
            yield Content(held)

    def _read(self, text: str) -> Iterator[Delta]:
        assert self._reader is not None
        if not self._is_known:
            self._raw.append(text)
        deltas, rest = self._reader.feed(text)
        yield from deltas
        self._size += len(text)
        if not self._is_known and self._size >= MAX_UNKNOWN:
            self._reader.refused = True
        if self._reader.refused:
            self._reader = None
            raw, self._raw = "".join(self._raw), []
            first = len(raw) - len(raw.lstrip(_SPACE)) + 1
            yield Content(raw[:first])
            self._held = raw[first:]  # which may hold another mark
        elif rest is not None:
            self._reader = None
            self._held = rest.lstrip(_SPACE)

    @property
    def _is_known(self) -> bool:
        """Whether the section has turned out to be one."""
        return self.calls.count > self._num_before

    def _find(self, text: str) -> tuple[int, int] | None:
        """Where a section begins, and the length of its mark; else what cannot be told yet is held back."""
        if not self._begun and self.at_beginning:  # before a mark that may follow in the same piece
            start = text.lstrip(_SPACE)
            if start and start[0] in self.at_beginning:
                return len(text) - len(start), 0
            if not start:
                self._held = text
                return None
        places = [(place, len(mark)) for mark in self.marks if (place := text.find(mark)) >= 0]
        if places:
            return min(places)
        hold = longest_beginning(text, self.marks)
        # White space before a mark is no content.
        kept = len(text[: len(text) - hold].rstrip(_SPACE)) if self.marks else len(text)
        self._held = text[kept:]
        return None

    def _content(self, text: str) -> Iterator[Delta]:
        if text:
            self._begun = True
            yield Content(text)


def longest_beginning(text: str, marks: Sequence[str]) -> int:
    """Characters at the end of ``text`` that a mark, or a stop text, may begin with; never all of one."""
    longest = 0
    for mark in marks:
        for size in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:size]):
                longest = size
                break
    return longest


@dataclass(slots=True)
class JsonCalls:
    """Calls as JSON: an object, several behind one another, or a list of them; name and arguments in any order."""

    calls: Calls
    end_marks: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    """Marks that may stand before each further call."""
    _scanner: ObjectScanner | None = None
    _call: CallBegins | None = None
    _waiting: list[str] = field(default_factory=list)
    """Arguments that came before the name."""
    _has_arguments: bool = False
    refused: bool = False
    _in_list: bool = False
    _num_read: int = 0
    _held: str = ""
    _raw: list[str] = field(default_factory=list)
    """Of the object that is being read, until it turns out to be a call."""

    def feed(self, text: str) -> tuple[list[Delta], str | None]:
        deltas: list[Delta] = []
        text = self._held + text
        self._held = ""
        while True:
            if self._scanner is not None:
                scanner, text = self._scanner, self._scan(text, deltas)
                if scanner.failed or (scanner.ended and self._call is None):
                    if self._call is None and not self._num_read:
                        self.refused = True
                    return deltas, text
                if self._scanner is not None:
                    return deltas, None
            text = text.lstrip(_BETWEEN_CALLS if self._num_read else _SPACE)
            if not text:
                return deltas, None
            if text[0] == "{":
                self._scanner, self._call, self._waiting = ObjectScanner(ARGUMENTS), None, []
                self._has_arguments, self._raw = False, []
                continue
            if text[0] == "[" and not self._num_read and not self._in_list and not _starts(text, self.again):
                self._in_list, text = True, text[1:]
                continue
            if text[0] == "]" and self._in_list:
                self._in_list, text = False, text[1:]
                if not self.end_marks:
                    self.refused = not self._num_read
                    return deltas, text
                continue
            mark = next((mark for mark in (*self.end_marks, *self.again) if text.startswith(mark)), None)
            if mark is not None:
                text = text[len(mark) :]
                if mark in self.end_marks:
                    self.refused = not self._num_read
                    return deltas, text
                continue
            if any(mark.startswith(text) for mark in (*self.end_marks, *self.again)):
                self._held = text
                return deltas, None
            self.refused = not self._num_read
            return deltas, text

    def end(self) -> None:
        self.refused = not self._num_read and self._call is None

    def _scan(self, text: str, deltas: list[Delta]) -> str:
        """Read on in an object; what is left when it has ended, or was no call."""
        scanner = self._scanner
        assert scanner is not None
        parts, rest = scanner.feed(text)
        if self._call is None:
            self._raw.append(text[: len(text) - len(rest)])
        for _, part in parts:
            self._has_arguments = True
            self._waiting.append(part)
        if self._call is None and scanner.strings.get("name", "") not in self.calls.names and "name" in scanner.strings:
            scanner.failed = True
        elif self._call is None and "name" in scanner.strings:
            self._call = self.calls.begin(scanner.strings["name"])
            deltas.append(self._call)
        if self._call is not None and self._waiting:
            deltas.append(CallArguments(self._call.index, "".join(self._waiting)))
            self._waiting = []
        if scanner.failed or (scanner.ended and self._call is None):
            return rest if self._call is not None else "".join([*self._raw, rest])
        if not scanner.ended:
            return ""
        assert self._call is not None
        if not self._has_arguments:
            deltas.append(CallArguments(self._call.index, "{}"))
        self._num_read += 1
        self._scanner = None
        return rest


def _starts(text: str, marks: tuple[str, ...]) -> bool:
    return any(text.startswith(mark) or mark.startswith(text) for mark in marks)


@dataclass(slots=True)
class NamedCalls:
    """A name, a mark, and the arguments as a JSON object: Mistral from v11 on, DeepSeek."""

    calls: Calls
    name_ends: tuple[str, ...]
    call_marks: tuple[str, ...] = ()
    """Marks that stand before each call."""
    end_marks: tuple[str, ...] = ()
    """Marks that end the section."""
    noise: tuple[str, ...] = ()
    """What may stand between, and says nothing."""
    refused: bool = False
    _text: str = ""
    _call: CallBegins | None = None
    _scanner: _WholeObject | None = None
    _num_read: int = 0

    def feed(self, text: str) -> tuple[list[Delta], str | None]:
        deltas: list[Delta] = []
        self._text += text
        while True:
            if self._scanner is not None and self._call is not None:
                part, self._text = self._scanner.feed(self._text)
                if part:
                    deltas.append(CallArguments(self._call.index, part))
                if self._scanner.failed:
                    return deltas, self._text
                if not self._scanner.ended:
                    return deltas, None
                self._scanner, self._call, self._num_read = None, None, self._num_read + 1
                continue
            self._text = self._text.lstrip(_SPACE)
            marks = (*self.end_marks, *self.call_marks, *self.noise)
            if _is_cut_off(self._text, marks):
                return deltas, None
            mark = max((mark for mark in marks if self._text.startswith(mark)), key=len, default=None)
            if mark is not None:
                self._text = self._text[len(mark) :]
                if mark in self.end_marks:
                    return deltas, self._text
                continue
            found = self._name()
            if found is None:
                if len(self._text) <= MAX_NAME and not self.refused:
                    return deltas, None
                self.refused = not self._num_read
                return deltas, self._text
            name, length = found
            if name not in self.calls.names:
                self.refused = not self._num_read
                return deltas, self._text
            self._text = self._text[length:]
            self._call, self._scanner = self.calls.begin(name), _WholeObject(self.noise)
            deltas.append(self._call)

    def _name(self) -> tuple[str, int] | None:
        """The next call's name, and the length of all up to its arguments; None if it is not all there, or none."""
        text = self._text
        places = [place for end in (*self.name_ends, "{", *_SPACE) if (place := text.find(end)) >= 0]
        if not places:
            return None
        place = min(places)
        name = text[:place]
        end = next((end for end in self.name_ends if text.startswith(end, place)), None)
        if name and end is not None:
            return name, place + len(end)
        rest = _without(text[place:], self.noise)
        if name and rest.startswith("{"):
            return name, len(text) - len(rest)
        self.refused = not self._num_read and not (name and _may_be(rest, self.noise))
        return None

    def end(self) -> None:
        self.refused = not self._num_read and self._call is None


MAX_NAME = 256


def _without(text: str, noise: tuple[str, ...]) -> str:
    """The text behind white space and noise, as far as one can tell."""
    while True:
        text = text.lstrip(_SPACE)
        if _is_cut_off(text, noise):
            return text
        mark = max((mark for mark in noise if text.startswith(mark)), key=len, default=None)
        if mark is None:
            return text
        text = text[len(mark) :]


def _is_cut_off(text: str, marks: tuple[str, ...]) -> bool:
    """Whether a mark may be on its way that is longer than the text."""
    return any(len(mark) > len(text) and mark.startswith(text) for mark in marks)


def _may_be(text: str, noise: tuple[str, ...]) -> bool:
    """Whether it is too early to tell if noise follows."""
    return not text or any(mark.startswith(text) for mark in noise)


@dataclass(slots=True)
class _WholeObject:
    """One JSON object, handed out as it comes. Noise may stand before it."""

    noise: tuple[str, ...]
    ended: bool = False
    failed: bool = False
    _depth: int = 0
    _in_string: bool = False
    _escaped: bool = False

    def feed(self, text: str) -> tuple[str, str]:
        """What belongs to it, and the rest: what cannot be told yet, or what stands behind it."""
        if self._depth == 0:
            text = _without(text, self.noise)
            if _may_be(text, self.noise):
                return "", text
            if text[0] != "{":
                self.failed = True
                return "", text
        for place, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return text[: place + 1], text[place + 1 :]
        return text, ""


@dataclass(slots=True)
class XmlCalls:
    """``<function=name><parameter=key>value</parameter></function>``: Qwen3-Coder. Arguments come all at once."""

    calls: Calls
    parameters: Mapping[str, Mapping[str, Any]]
    """The schema of each tool's parameters: a text is not quoted, so its type says what it is."""
    end_marks: tuple[str, ...]
    refused: bool = False
    _text: str = ""
    _num_searched: int = 0
    _num_read: int = 0

    def feed(self, text: str) -> tuple[list[Delta], str | None]:
        deltas: list[Delta] = []
        self._text += text
        while True:
            if not self._num_searched:
                self._text = self._text.lstrip(_SPACE)
            mark = next((mark for mark in self.end_marks if self._text.startswith(mark)), None)
            if mark is not None and self._num_read:
                return deltas, self._text[len(mark) :]
            if not self._text or any(mark.startswith(self._text) for mark in (*self.end_marks, "<function=")):
                return deltas, None
            if not self._text.startswith("<function="):
                self.refused = not self._num_read
                return deltas, self._text
            end = self._text.find("</function>", self._num_searched)
            if end < 0:
                self._num_searched = max(len(self._text) - len("</function>"), 1)
                return deltas, None
            self._num_searched = 0
            name, _, rest = self._text[len("<function=") : end].partition(">")
            if name.strip(_SPACE) not in self.calls.names:
                self.refused = not self._num_read
                return deltas, self._text
            self._text = self._text[end + len("</function>") :]
            call = self.calls.begin(name.strip(_SPACE))
            deltas += [
                call,
                CallArguments(call.index, json.dumps(self._arguments(call.name, rest), ensure_ascii=False)),
            ]
            self._num_read += 1

    def end(self) -> None:
        self.refused = not self._num_read

    def _arguments(self, name: str, text: str) -> dict[str, Any]:
        properties = self.parameters.get(name, {}).get("properties") or {}
        arguments: dict[str, Any] = {}
        for part in text.split("<parameter=")[1:]:
            key, _, value = part.partition(">")
            value = value.partition("</parameter>")[0].removeprefix("\n").removesuffix("\n")
            declared = properties.get(key.strip(_SPACE)) or {}
            arguments[key.strip(_SPACE)] = value if declared.get("type") == "string" else _json_or_text(value)
        return arguments


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


# ---------------------------------------------------------------------------------------------------

_ALPHANUMERIC = string.ascii_letters + string.digits


def openai_id(index: int) -> str:
    return f"call_{secrets.token_hex(12)}"


def mistral_id(index: int) -> str:
    """Nine letters and digits, which its templates insist on."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


def counted_id(index: int) -> str:
    """TGI's, which its own client reads as a number."""
    return str(index)
