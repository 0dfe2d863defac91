"""Answers taken apart: however the text is cut into pieces, the same calls, content and reasoning come out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from text_generation_router.chat.output import (
    MAX_UNKNOWN,
    CallArguments,
    CallBegins,
    Content,
    Plain,
    Reasoning,
    ReasoningStage,
    Stage,
    counted_id,
)
from text_generation_router.chat.tools import FORMATS, Tool, ToolFormat, Tools

TOOLS = Tools(
    (
        Tool(
            "weather", "", {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
        ),
        Tool("time", "", {"type": "object", "properties": {}}),
    ),
    forced=False,
    parallel=True,
)
BY_NAME = {form.name: form for form in FORMATS}


def form(name: str) -> ToolFormat:
    return BY_NAME[name]


def read(stage: Stage, pieces: Sequence[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """Content, reasoning, and calls as (name, arguments)."""
    content, reasoning = "", ""
    calls: list[tuple[str, str]] = []
    parts = [part for piece in pieces for part in stage.feed(piece)]
    for part in [*parts, *stage.end()]:
        match part:
            case Content(text):
                assert text
                content += text
            case Reasoning(text):
                assert text
                reasoning += text
            case CallBegins(index, call_id, name):
                assert (index, call_id) == (len(calls), str(len(calls)))
                calls.append((name, ""))
            case CallArguments(index, text):
                assert index == len(calls) - 1, "one after another"
                calls[index] = (calls[index][0], calls[index][1] + text)
    return content, reasoning, calls


CITY = {"city": 'Paris {"x"} é', "days": 2}
ARGUMENTS = json.dumps(CITY, ensure_ascii=False)
CALLS = [("weather", CITY), ("time", {})]

HERMES = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
HERMES_TIME = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
LLAMA = f'{{"name": "weather", "parameters": {ARGUMENTS}}}'
LISTED = f'[{{"name": "weather", "arguments": {ARGUMENTS}}}, {{"name": "time"}}]'
DEEPSEEK = (
    f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{ARGUMENTS}\n```<｜tool▁call▁end｜>\n"
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
DEEPSEEK_31 = (
    f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>time<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
QWEN_CODER = (
    f"<tool_call>\n<function=weather>\n<parameter=city>\n{CITY['city']}\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "</function>\n</tool_call>\n<tool_call>\n<function=time>\n</function>\n</tool_call>"
)

WRITTEN: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("hermes", f"{HERMES}\n{HERMES_TIME}", "", CALLS),
    ("hermes", f"I will look.\n\n{HERMES}", "I will look.", CALLS[:1]),
    ("hermes", f'<tool_call>{{"arguments": {ARGUMENTS}, "name": "weather"}}</tool_call>', "", CALLS[:1]),
    ("llama3_json", f'{LLAMA}; {{"name": "time", "parameters": {{}}}}', "", CALLS),
    ("llama3_json", f'<|python_tag|>{{"type": "function", {LLAMA[1:]}', "", CALLS[:1]),
    ("mistral", f"[TOOL_CALLS] {LISTED}", "", CALLS),
    ("mistral_named", f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]time[ARGS]{{}}", "", CALLS),
    ("mistral_named", f"Well.[TOOL_CALLS]weather{ARGUMENTS}", "Well.", CALLS[:1]),
    ("granite", f"<|tool_call|>{LISTED}", "", CALLS),
    ("deepseek_v3", DEEPSEEK, "", CALLS),
    ("deepseek_v3", f"Hm.{DEEPSEEK_31}", "Hm.", CALLS),
    ("qwen3_coder", QWEN_CODER, "", CALLS),
    ("json", LLAMA, "", CALLS[:1]),
    ("json", LISTED, "", CALLS),
    ("json", '{"name": "weather", "parameters": ' + json.dumps(ARGUMENTS) + "}", "", CALLS[:1]),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), WRITTEN)
def test_every_family_is_understood(name: str, text: str, content: str, calls: list[tuple[str, Any]]) -> None:
    got, _, found = read(form(name).stage(TOOLS, counted_id), [text])
    assert got.rstrip() == content
    assert [(tool, json.loads(arguments)) for tool, arguments in found] == calls


SHREDS = [
    *(
        "<tool_call>",
        "</tool_call>",
        '{"name": "time"',
        ', "arguments": {"a": [1, "]"]}',
        "}",
        "[",
        "]",
        " ",
        "\n",
        ";",
    ),
    *(
        "[TOOL_CALLS]",
        "[ARGS]",
        "time",
        "<|python_tag|>",
        "<function=time>",
        "</function>",
        "hello",
        '"',
        "\\",
        "{",
        ":",
    ),
    *("<think>", "</think>", "<", "｜", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"),
]
TEXTS = st.sampled_from([text for _, text, _, _ in WRITTEN]) | st.lists(st.sampled_from(SHREDS), max_size=14).map(
    "".join
)


@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from(sorted(BY_NAME)),
    text=TEXTS,
    cuts=st.lists(st.integers(0, 400), max_size=30),
    thinks=st.booleans(),
)
@example(name="llama3_json", text='{"name": "time", "arguments": {}<|python_tag|>', cuts=[1], thinks=False)
def test_how_the_text_is_cut_changes_nothing(name: str, text: str, cuts: list[int], thinks: bool) -> None:
    def stage() -> Stage:
        calls: Stage = form(name).stage(TOOLS, counted_id)
        return ReasoningStage("<think>", "</think>", calls) if thinks else calls

    places = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    pieces = [text[start:stop] for start, stop in pairwise(places)]
    whole = read(stage(), [text])
    assert read(stage(), pieces) == whole
    assert read(stage(), list(text)) == whole


@given(name=st.sampled_from(sorted(BY_NAME)), text=st.text("abc <>[]{}\n", max_size=40))
@example(name="json", text="[]")
@example(name="json", text="[ ] a")
@example(name="hermes", text="<tool_call></tool_call>")
@example(name="json", text='{"name": "Bob", "age": 3} is a person')
@example(name="hermes", text='a <tool_call>{"arguments": {"x": 1}, "name": "x"}</tool_call> b')
@example(name="qwen3_coder", text="<tool_call><function=x><parameter=a>1</parameter></function></tool_call>")
@example(name="mistral_named", text="[TOOL_CALLS]x[ARGS]{}")
@example(name="mistral", text="a [TOOL_CALLS][] b")
def test_what_is_no_call_is_content_to_the_last_character(name: str, text: str) -> None:
    content, _, calls = read(form(name).stage(TOOLS, counted_id), list(text))
    assert calls == []
    assert content == text


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\nHm, well.\n</think>\n\nParis.", "Hm, well.", "Paris."),
        ("Paris.", "", "Paris."),
        ("<think></think>Paris.", "", "Paris."),
        ("<think>no end", "no end", ""),
        ("A <think> later", "", "A <think> later"),
        ("<thin", "", "<thin"),
    ],
)
def test_reasoning_comes_first_or_not_at_all(text: str, reasoning: str, content: str) -> None:
    for pieces in ([text], list(text)):
        assert read(ReasoningStage("<think>", "</think>", Plain()), pieces) == (content, reasoning, [])


def test_a_prompt_may_have_opened_the_reasoning() -> None:
    stage = ReasoningStage("<think>", "</think>", Plain(), inside=True)
    assert read(stage, ["Hm.\n</th", "ink>\nParis"]) == ("Paris", "Hm.", [])


def test_arguments_stream_as_they_come() -> None:
    stage = form("hermes").stage(TOOLS, counted_id)
    pieces = ['<tool_call>{"name": "weather",', ' "arguments": {"city": "Pa', 'ris"}', "}</tool_call>"]
    assert [list(stage.feed(piece)) for piece in pieces] == [
        [CallBegins(0, "0", "weather")],
        [CallArguments(0, '{"city": "Pa')],
        [CallArguments(0, 'ris"}')],
        [],
    ]


@pytest.mark.parametrize("behind", ["<|python_tag|>", "Well.", '"a"', "{}", "[1]", ": 1", "]"])
@pytest.mark.parametrize("value", ['{"a": 1}', '{"a": {"b": []}}', "[]"])
def test_what_stands_behind_the_end_of_the_arguments_is_no_part_of_them(value: str, behind: str) -> None:
    text = '{"name": "time", "arguments": ' + value + " " + behind
    for pieces in ([text], list(text)):
        stage = form("llama3_json").stage(TOOLS, counted_id)
        assert read(stage, pieces) == (behind, "", [("time", value)])


@pytest.mark.parametrize("size", [MAX_UNKNOWN - 40, MAX_UNKNOWN - 10, MAX_UNKNOWN, MAX_UNKNOWN + 10, 2 * MAX_UNKNOWN])
def test_a_section_is_given_up_at_the_same_character_however_it_comes(size: int) -> None:
    text = '<tool_call>{"id": "' + "a" * size + '", "name": "time", "arguments": {}}</tool_call>'
    whole = read(form("hermes").stage(TOOLS, counted_id), [text])
    assert whole == (("", "", [("time", "{}")]) if size < MAX_UNKNOWN - 20 else (text, "", []))
    for step in (1000, MAX_UNKNOWN - 1):
        pieces = [text[start : start + step] for start in range(0, len(text), step)]
        assert read(form("hermes").stage(TOOLS, counted_id), pieces) == whole


@pytest.mark.parametrize(
    "text", ['{"' * 250_000, "<tool_call>" * 100_000, '<tool_call>{"name": "' + "a" * 1_000_000, "[" * 1_000_000]
)
def test_a_megabyte_of_nonsense_is_read_in_linear_time(text: str) -> None:
    """Quadratic work would take hours: the test would not end."""
    for name in BY_NAME:
        stage = form(name).stage(TOOLS, counted_id)
        for start in range(0, len(text), 5000):
            list(stage.feed(text[start : start + 5000]))
        list(stage.end())
